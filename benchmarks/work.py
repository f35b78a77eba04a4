"""What the instructions of a program compiled for a TPU do: kinds of work, blocks of the network, and collectives."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from diffusion_jax.distributed import hlo

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective over groups of `devices`; sent: the bytes that a device sends in a ring, in all of its `executions`."""

    kind: str
    executions: int
    devices: int
    sent: float


def collectives(program: hlo.Program) -> list[Collective]:
    """Returns the collectives of a program, except those in fusions; -done instructions are not counted again."""
    found = []
    for instruction, count in program.executed():
        if not (kind := _collective(instruction)):
            continue
        devices = 2 if kind == "collective-permute" else _group_size(instruction.line)
        arrays = instruction.arrays
        if instruction.opcode == "all-gather-start":
            arrays = arrays[len(arrays) // 2 :]  # the inputs come first
        size = sum(array.size for array in arrays)
        share = (devices - 1) / devices
        factor = {"all-reduce": 2 * share, "reduce-scatter": devices - 1, "collective-permute": 1}.get(kind, share)
        found.append(Collective(kind, count, devices, count * size * factor))
    return found


def num_fused_collectives(program: hlo.Program) -> int:
    """Returns the number of executed fusions that contain a collective, such as a gather beside arithmetic."""
    return sum(
        count
        for instruction, count in program.executed()
        if instruction.opcode == "fusion"
        and any(_collective(each) for name in instruction.called for each in program.computations[name].values())
    )


def _collective(instruction: hlo.Instruction) -> str:
    """Returns the kind of collective that an instruction starts, or ""."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _group_size(line: str) -> int:
    """Returns the number of devices in each group of a collective.

    Forms: [groups,size]<=..., {{0,1},{2,3}}, or axes of mesh['x'=2,...], in the order of device_ids=(...) if given.
    Raises: ValueError for another form.
    """
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    raise ValueError(f"unknown groups of devices in {line[:200]!r}")


def kind_of_work(program: hlo.Program, instruction: hlo.Instruction) -> str:
    """Returns the kind of work of an instruction, from its opcode, its metadata and its fused computation."""
    op, opcode = instruction.op_name, instruction.opcode
    if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return "collectives"
    if next(program.products(instruction), None):
        return "convolutions and products"
    if re.search(r"threefry|random_bits|rng_bit_generator|Dropout|_uniform|_normal\b|iota_2x32", op):
        return "random numbers and dropout"
    if opcode.startswith("copy") or opcode in ("transpose", "reshape", "concatenate", "slice") or not op:
        return "copies"
    if re.search(r"/norm\w*/|_normalize", op):
        return "norms"
    if not block_of_network(op):  # the loss, the optimizer and the EMA
        return "outside the network"
    return "sums" if op.endswith("reduce_sum") else "other elementwise"


def block_of_network(op_name: str) -> str:
    """Returns the network's block, such as down_0_block_1, of an instruction's metadata; "" outside of the network."""
    found = re.search(r"(?:^|[/(])(?:UNet|MLP|Classifier|Inception|ResBlock|Attention)\)*/(.*)", op_name)
    # The names of methods, such as UNet.encode, stand between.
    return next((part for part in found[1].split("/") if "." not in part), "") if found else ""
