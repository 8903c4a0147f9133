"""A byte-level language model with a window of attention, on the source of Python's standard library."""
