"""Devices and processes: the mesh, sharding, agreement between processes, signals and compiler options."""
