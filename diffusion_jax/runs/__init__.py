"""The modes of the program. Each module with `run(config, workdir)` is a mode; all modes share the remaining modules."""
