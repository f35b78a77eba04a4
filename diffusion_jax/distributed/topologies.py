"""TPU topologies, for which the package libtpu compiles programs on a machine without TPUs."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

from jax.experimental import topologies

from diffusion_jax.errors import UserError, first_line


class Chip(NamedTuple):
    """Published figures of a device: bytes of memory, bfloat16 FLOP/s, and bytes/s between the device and its memory.

    flops_per_cycle: FLOPs of all matrix units in a cycle. For a product of two 4096 x 4096 bfloat16 matrices, the compiler
    estimates 3% to 15% more cycles than this number gives. axes: the number of axes in a topology's shape.
    """

    memory: float
    flops: float
    bandwidth: float
    flops_per_cycle: int
    axes: int

    @property
    def clock(self) -> float:
        """The cycles per second that the two published figures imply, 1.05e9 to 1.75e9."""
        return self.flops / self.flops_per_cycle


CHIPS = {
    "v4": Chip(32e9, 275e12, 1228e9, 2**18, 3),
    "v5e": Chip(16e9, 197e12, 819e9, 2**17, 2),
    "v5p": Chip(95e9, 459e12, 2765e9, 2**18, 3),
    "v6e": Chip(32e9, 918e12, 1640e9, 2**19, 2),
}


def find_chip(topology: str) -> Chip:
    """Returns the chip of a topology, such as "v5e:2x2". Raises: UserError for another form or another chip."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+" + r"x\d+" * (CHIPS[name].axes - 1), shape):
        raise UserError(
            f"{topology!r} is not a TPU topology; use a chip ({', '.join(CHIPS)}) with a shape, such as v5e:4x4 or v4:2x2x1"
        )
    return CHIPS[name]


def tpu_devices(topology: str) -> list:
    """Returns the devices of a topology, such as "v5e:2x2". Programs can be compiled for these devices, but not run.

    Raises: UserError if libtpu is not installed, or for a topology that libtpu does not know.
    """
    find_chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs libtpu; pip install -r requirements/tpu.txt, or make setup EXTRA=tpu"
        )
    # Without these variables, libtpu would look for a TPU on this machine.
    environment = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in (environment | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}).items():
        os.environ.setdefault(name, value)
    # JAX's meshes need one device for each chip; by default, each of a v4 chip's two cores is a device.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # the error's type differs between versions of JAX
        raise UserError(f"libtpu does not know the topology {topology!r}: {first_line(error)}") from error
