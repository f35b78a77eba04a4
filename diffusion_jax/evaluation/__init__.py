"""Measures of trained models that need more than jax and numpy; each is imported by its name."""
