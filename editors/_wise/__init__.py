"""The parts of WISE: side memories, their merging, routing, the rows of an edit, training, recorded runs."""
