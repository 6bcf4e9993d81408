"""The parts of GRACE: its codebook, the index of its keys, the training of its values."""
