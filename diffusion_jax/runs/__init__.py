"""Modes of the program: each module with a `run(config, workdir)` is a mode, the others are what modes share."""
