"""Examples that run: `python -m examples.language_model` and `python -m examples.particles`, from a checkout."""
