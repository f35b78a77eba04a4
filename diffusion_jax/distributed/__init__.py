"""Devices and processes: the mesh, sharding, agreement between processes, preemption and compiler options."""
