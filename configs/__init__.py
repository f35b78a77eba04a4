"""Experiments: each file has hyperparameters alone, a `get_config()`, and a docstring with the command that runs it."""
