"""Reads the text of a program compiled for a TPU: instructions with the compiler's estimated cycles, and layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}
_PRODUCTS = ("convolution", "dot")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\((\d+(?:,\d+)?)\))?([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?(%[\w.-]+) \(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%[\w.-]+)")


class Array(NamedTuple):
    """A dense array. size: bytes of the elements; padded: bytes with the padding of the layout's tiles.

    in_memory: whether it is in the device's main memory, and not in the small memory beside the cores.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    padded: int
    in_memory: bool


class Instruction(NamedTuple):
    """An instruction. cycles: estimate for one execution. called: names of called computations. line: text after the name."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    op_name: str
    cycles: int
    called: tuple[str, ...]
    line: str


class Program:
    """The computations in the text of a scheduled HLO module: {computation's name: {instruction's name: Instruction}}."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                current = self.computations[start[2]] = {}
                if start[1]:
                    self.entry = start[2]
            elif match := _INSTRUCTION.match(line):
                current[match[2]] = _read_instruction(match[2], line[match.end() :])
        if not hasattr(self, "entry"):
            raise ValueError("the text is not a compiled HLO module: it has no line that starts with ENTRY")

    def executed(self, computation: str = "", count: int = 1) -> Iterator[tuple[Instruction, int]]:
        """Yields each scheduled instruction with the number of its executions, also inside of loops and conditionals.

        A loop with an unknown number of iterations counts once, and so does each branch of a conditional.
        """
        for instruction in self.computations[computation or self.entry].values():
            yield instruction, count
            if instruction.opcode in ("while", "conditional", "call"):
                for name in instruction.called:
                    yield from self.executed(name, count * self._iterations(instruction))

    def _iterations(self, instruction: Instruction) -> int:
        """Returns a loop's number of iterations: as stated, or the limit of its counter, as in a scan; 1 if unknown."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.line):
            return int(known[1])
        condition = re.search(r"condition=(%[\w.-]+)", instruction.line)
        parts = self.computations[condition[1]].values() if condition else ()
        if sum("direction=LT" in part.line for part in parts) != 1:
            return 1
        limits = [found[1] for part in parts if (found := re.match(r"s32\[\]\S* constant\((\d+)\)", part.line))]
        return int(limits[0]) if len(limits) == 1 else 1

    def products(self, instruction: Instruction) -> Iterator[tuple[Instruction, list[str]]]:
        """Yields the convolutions and products of an instruction, also in a fusion, with the dtypes of their operands."""

        def search(each: Instruction, known: dict[str, Instruction]) -> Iterator[tuple[Instruction, list[str]]]:
            if each.opcode in _PRODUCTS:
                yield each, [known[name].arrays[0].dtype for name in each.operands if name in known]
            elif each.opcode == "fusion":
                for name in each.called:
                    inner = self.computations[name]
                    for part in inner.values():
                        yield from search(part, inner)

        home = next((c for c in self.computations.values() if c.get(instruction.name) is instruction), {})
        yield from search(instruction, home)

    @property
    def cycles(self) -> int:
        """The estimated cycles of one execution of the program."""
        return sum(count * instruction.cycles for instruction, count in self.executed())

    @property
    def host_calls(self) -> list[str]:
        """The lines of instructions that call or wait for the host."""
        lines = (instruction.line for part in self.computations.values() for instruction in part.values())
        return [line for line in lines if re.search(r"\b(infeed|outfeed)\(|is_host_transfer=true|xla_.*callback", line)]


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


def _read_instruction(name: str, text: str) -> Instruction:
    """Reads an instruction from the text after its name, `TYPE opcode(operands), attributes`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _closing("(" + rest, 0) - 1
    attributes = rest[close:]
    cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    called = tuple(n for group in _CALLED.findall(attributes) for n in re.findall(r"%[\w.-]+", group))
    return Instruction(
        name,
        opcode,
        read_arrays(text[:end]),
        tuple(re.findall(r"%[\w.-]+", rest[:close])),
        op_name[1] if op_name else "",
        int(cycles[1]) if cycles else 0,
        called,
        text,
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the parenthesis at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
