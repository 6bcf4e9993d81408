"""A harness in which lifelong model editors are compared."""
