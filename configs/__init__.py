"""Hyperparameters only: each file's `get_config()` is one experiment, and says how to run it."""
