"""Tasks: classification, question answering, completion and language modelling."""
