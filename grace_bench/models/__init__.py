"""Models: the network with its edited layer, how text becomes tensors, how passes are computed, and what a task is."""
