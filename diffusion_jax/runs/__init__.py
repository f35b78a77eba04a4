"""Runs: each is a function of (config, workdir) that leaves files in the work directory."""
