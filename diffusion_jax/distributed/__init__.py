"""Devices and processes: the mesh, sharding, compiler options, agreement between processes, and signals."""
