"""The collectives of a compiled program, parsed from its HLO: the data that its devices send to each other.

A collective inside a loop is counted once, independent of the number of iterations.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

__all__ = ["Collective", "parse", "summarize"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})\((?P<rest>.*)")
_SHAPE = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation.

    bytes: size of its result on one device. largest: bytes of the largest array in the result. devices: size of its group.
    """

    kind: str
    bytes: int
    largest: int
    devices: int

    @property
    def ring_bytes(self) -> float:
        """Bytes that each device sends in a ring algorithm, which is the minimum of all algorithms."""
        fraction = (self.devices - 1) / self.devices
        return {
            "all-gather": fraction * self.bytes,
            "all-reduce": 2 * fraction * self.bytes,  # a reduce-scatter and an all-gather
            "reduce-scatter": fraction * self.bytes * self.devices,
            "all-to-all": fraction * self.bytes,
            "collective-permute": float(self.bytes),
        }[self.kind]


def parse(hlo: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`. Raises: ValueError for asynchronous ones, which accelerators have."""
    if start := re.search(rf" ({'|'.join(_KINDS)})-start\(", hlo):
        raise ValueError(f"{start[1]}-start: only programs compiled for the CPU can be parsed")
    collectives = []
    for line in hlo.splitlines():
        if match := _LINE.search(line):
            sizes = [_num_bytes(shape) for shape in _SHAPE.finditer(match["result"])]
            collectives.append(Collective(match["kind"], sum(sizes), max(sizes), _group_size(match["rest"])))
    return collectives


def _num_bytes(shape: re.Match[str]) -> int:
    bits = 8 if shape["type"] == "pred" else int(shape["bits"])
    return math.prod(int(size) for size in shape["sizes"].split(",") if size) * bits // 8


def _group_size(rest: str) -> int:
    """The devices of a group: replica_groups={{0,1},{2,3}}, or [groups,size]<=[...], or mesh['a'=2,'b'=4] {'b'}."""
    if match := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        # A part of an axis is written 'b':(size before it)size.
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    if "source_target_pairs" in rest:
        return 2
    raise ValueError(f"cannot parse the devices of a collective: {rest[:200]}")


def summarize(collectives: list[Collective]) -> list[tuple[str, int, int, float]]:
    """(kind, count, total bytes, total ring bytes) of each kind that occurs."""
    rows = []
    for kind in _KINDS:
        of_kind = [c for c in collectives if c.kind == kind]
        if of_kind:
            rows.append((kind, len(of_kind), sum(c.bytes for c in of_kind), sum(c.ring_bytes for c in of_kind)))
    return rows
