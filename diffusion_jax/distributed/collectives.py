"""What a compiled program sends between devices, read from its HLO.

A collective is counted as often as it stands in the text: one inside a loop once, however often the loop runs.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})\((?P<rest>.*)")
_SHAPE = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")


class Collective(NamedTuple):
    """One collective. bytes: of its result on one device; largest: of the largest array in it; devices: of its ring."""

    kind: str
    bytes: int
    largest: int
    devices: int

    @property
    def ring_bytes(self) -> float:
        """Bytes that each device sends when the collective goes around a ring, the least that any algorithm sends."""
        share = (self.devices - 1) / self.devices
        return {
            "all-gather": share * self.bytes,
            "all-reduce": 2 * share * self.bytes,  # a reduce-scatter and an all-gather
            "reduce-scatter": share * self.bytes * self.devices,
            "all-to-all": share * self.bytes,
            "collective-permute": float(self.bytes),
        }[self.kind]


def read(hlo: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`. Raises: ValueError for asynchronous ones, as accelerators' programs have."""
    if started := re.search(rf" ({'|'.join(_KINDS)})-start\(", hlo):
        raise ValueError(f"{started[1]}-start: only programs compiled for the CPU can be read")
    found = []
    for line in hlo.splitlines():
        if match := _LINE.search(line):
            arrays = [_bytes(shape) for shape in _SHAPE.finditer(match["result"])]
            found.append(Collective(match["kind"], sum(arrays), max(arrays), _ring(match["rest"])))
    return found


def _bytes(shape: re.Match) -> int:
    bits = 8 if shape["type"] == "pred" else int(shape["bits"])
    return math.prod(int(size) for size in shape["sizes"].split(",") if size) * bits // 8


def _ring(rest: str) -> int:
    """The size of a group: replica_groups={{0,1},{2,3}}, or [groups,size]<=[...], or mesh['a'=2,'b'=4] {'b'}."""
    if match := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        # A part of an axis is written 'b':(parts before it)size.
        named = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    if "source_target_pairs" in rest:
        return 2
    raise ValueError(f"cannot read the devices of a collective: {rest[:200]}")


def table(collectives: list[Collective]) -> list[tuple[str, int, int, float]]:
    """(kind, how many, their bytes, their ring bytes) of each kind that there is."""
    rows = []
    for kind in _KINDS:
        of_kind = [c for c in collectives if c.kind == kind]
        if of_kind:
            rows.append((kind, len(of_kind), sum(c.bytes for c in of_kind), sum(c.ring_bytes for c in of_kind)))
    return rows
