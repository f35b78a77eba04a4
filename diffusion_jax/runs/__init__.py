"""Modes of the program: each module with a `run(config, workdir)` is a mode; the modes share the others."""
