"""Reads the text of a program compiled for a TPU: its instructions, with the compiler's estimated cycles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?(%[\w.-]+) \(")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")  # layouts in the type before the opcode have T(...) and S(...)
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%[\w.-]+)")


class Instruction(NamedTuple):
    """An instruction. cycles: estimate for one execution. called: names of called computations. line: text after the name."""

    name: str
    opcode: str
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

    @property
    def cycles(self) -> int:
        """The estimated cycles of one execution of the program."""
        return sum(count * instruction.cycles for instruction, count in self.executed())


def _read_instruction(name: str, text: str) -> Instruction:
    """Reads an instruction from the text after its name, `TYPE opcode(operands), attributes`."""
    opcode, cycles = _OPCODE.search(text), re.search(r'"estimated_cycles":"(\d+)"', text)
    called = tuple(n for group in _CALLED.findall(text) for n in re.findall(r"%[\w.-]+", group))
    return Instruction(name, opcode[1] if opcode else "", int(cycles[1]) if cycles else 0, called, text)
