"""Examples that run from a checkout, such as `python -m examples.particles`."""
