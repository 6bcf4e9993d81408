"""Models: the network with its edited layer, text encoding, engines and tasks."""
