"""Experiments: each file has a `get_config()` that only sets hyperparameters, and a docstring with the command to run it."""
