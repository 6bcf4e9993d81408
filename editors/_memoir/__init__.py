"""The parts of MEMOIR: its masks, its residual memory."""
