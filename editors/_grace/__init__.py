"""What GRACE alone needs: its codebook, the index of its keys, the training of its values."""
