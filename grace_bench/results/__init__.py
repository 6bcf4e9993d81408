"""The files of a run: their schema, and how to read them."""
