"""What the instructions of a program compiled for a TPU do: arrays, kinds of work, blocks of the network, and collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from diffusion_jax.distributed import hlo

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}
_PRODUCTS = ("convolution", "dot")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\((\d+(?:,\d+)?)\))?([^}]*)\})?")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """A dense array. size: bytes of the elements; padded: bytes with the padding of the layout's tiles.

    in_memory: whether it is in the device's main memory, and not in the small memory beside the cores.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    padded: int
    in_memory: bool


def read_arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays in the text of a type, such as bf16[32,32,3]{2,1,0:T(8,128)(2,1)}, or of a tuple of types."""
    found = []
    for dtype, dimensions, order, tile, rest in _ARRAY.findall(text):
        if dtype not in BYTES:
            continue
        shape = tuple(map(int, filter(None, dimensions.split(","))))
        padded = list(shape)
        tiles = [int(side) for side in tile.split(",")] if tile else []
        minor_first = [int(axis) for axis in order.split(",")] if order else []
        for axis, side in zip(minor_first, reversed(tiles), strict=False):
            padded[axis] = -(-shape[axis] // side) * side
        size, full = (math.prod(dims) * BYTES[dtype] for dims in (shape, padded))
        found.append(Array(dtype, shape, size, full, "S(" not in rest))
    return tuple(found)


def arrays_of(instruction: hlo.Instruction) -> tuple[Array, ...]:
    """Returns the arrays of an instruction's result."""
    return read_arrays(instruction.line.partition(f" {instruction.opcode}(")[0])


def op_name_of(instruction: hlo.Instruction) -> str:
    """Returns the name of the operation in the instruction's metadata; "" without one."""
    found = re.search(r'op_name="([^"]*)"', instruction.line)
    return found[1] if found else ""


def _operands(instruction: hlo.Instruction) -> list[str]:
    start = instruction.line.index(f" {instruction.opcode}(") + len(instruction.opcode) + 1
    return re.findall(r"%[\w.-]+", instruction.line[start : _closing(instruction.line, start)])


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the parenthesis at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def products(program: hlo.Program, instruction: hlo.Instruction) -> Iterator[tuple[hlo.Instruction, list[str]]]:
    """Yields the convolutions and products of an instruction, also in a fusion, with the dtypes of their operands."""

    def search(each: hlo.Instruction, known: dict[str, hlo.Instruction]) -> Iterator[tuple[hlo.Instruction, list[str]]]:
        if each.opcode in _PRODUCTS:
            yield each, [arrays_of(known[name])[0].dtype for name in _operands(each) if name in known]
        elif each.opcode == "fusion":
            for name in each.called:
                inner = program.computations[name]
                for part in inner.values():
                    yield from search(part, inner)

    home = next((c for c in program.computations.values() if c.get(instruction.name) is instruction), {})
    yield from search(instruction, home)


def host_calls(program: hlo.Program) -> list[str]:
    """Returns the lines of instructions that call or wait for the host."""
    lines = (instruction.line for part in program.computations.values() for instruction in part.values())
    return [line for line in lines if re.search(r"\b(infeed|outfeed)\(|is_host_transfer=true|xla_.*callback", line)]


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
        arrays = arrays_of(instruction)
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
    op, opcode = op_name_of(instruction), instruction.opcode
    if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return "collectives"
    if next(products(program, instruction), None):
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
