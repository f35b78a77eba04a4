"""The kernels of a program that XLA compiles for an accelerator, which need not be present: read from the compiled text.

On any machine with the plugin (`pip install jax-cuda12-plugin[with-cuda]`, `pip install libtpu`), jax compiles for a GPU from
a description of its properties, and for a TPU from its name. Without the card nothing is autotuned, so the algorithm of a
convolution, its workspace and its time are unknown.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: {fpus} core_count: {cores}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_core} shared_memory_per_block_optin: {shared_block}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "major": 9, "cores": 132, "fpus": 128, "clock": 1.98, "l2": 52428800}
    | {"bandwidth": 3352320000000, "memory": 84929347584, "shared_core": 233472, "shared_block": 232448},
    "a100": {"name": "NVIDIA A100-SXM4-80GB", "major": 8, "cores": 108, "fpus": 64, "clock": 1.41, "l2": 41943040}
    | {"bandwidth": 2039000000000, "memory": 85024112640, "shared_core": 167936, "shared_block": 166912},
}
_TPUS = {"v5e": "v5e:2x2"}
TARGETS = (*_GPUS, *_TPUS, "here")

KINDS = ("convolution", "dot", "reduction", "transposition", "element-wise", "other")
PHASES = ("forward", "backward", "rest")


@contextlib.contextmanager
def target(name: str) -> Iterator[str]:
    """In this context, programs are compiled for one device of the target; "here" is the device of this machine.

    Yields the kind of the device. Raises: RuntimeError, with what to install, if jax cannot compile for it.
    """
    if name == "here":
        yield jax.devices()[0].device_kind
        return
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it needs the driver, which comes with a card
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries the cloud for a TPU for minutes
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    try:
        if name in _GPUS:
            description = {"target_config": _GPU.format(**_GPUS[name]), "topology": "1x1x1"}
            topology = topologies.get_topology_desc(platform="cuda", **description)
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[name])
    except Exception as error:  # its type differs between versions; all mean that there is no such compiler
        package = "jax-cuda12-plugin[with-cuda], of jaxlib's version" if name in _GPUS else "libtpu"
        raise RuntimeError(f"cannot compile for {name} here ({str(error)[:80]}); it needs {package}") from None
    device, backend = topology.devices[0], "gpu" if name in _GPUS else "tpu"
    # The project queries the devices by these three functions only.
    make_mesh = functools.partial(jax.make_mesh, devices=[device])
    with mock.patch.multiple(jax, make_mesh=make_mesh, device_count=lambda: 1, default_backend=lambda: backend):
        yield device.device_kind


class Kernel(NamedTuple):
    """A kernel of a compiled program.

    kind: of `KINDS`, that of its most expensive operation. phase: of `PHASES`; "rest" is the update, and kernels without a
    name from jax, such as changes of the weights' layout. bytes: of its operands and results in the main memory of the chip,
    each counted fully. runs: the number of times that it runs, in loops. name: jax's name of its operation. layout: of a
    convolution.
    """

    kind: str
    phase: str
    bytes: int
    runs: int
    name: str
    layout: str


class _Line(NamedTuple):
    """An instruction of the compiled text. operands: their names, or the value of a constant."""

    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


_BYTES = {"pred": 1, "token": 0, "opaque": 0}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_EXPENSIVE = (
    ("convolution", {"convolution"}),
    ("dot", {"dot"}),
    ("reduction", {"reduce", "reduce-window"}),
    ("transposition", {"transpose", "copy"}),
)


def _size(type_: str) -> int:
    """Bytes of a type or a tuple of them, without those in a TPU's on-chip memory (S(1) in the layout)."""
    total = 0
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", type_):
        bits = re.search(r"\d+", dtype)
        width = _BYTES[dtype] if dtype in _BYTES else max(1, int(bits.group()) // 8) if bits else 4
        total += 0 if "S(1)" in layout else width * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _closing(text: str, start: int) -> int:
    """The position at which the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no bracket closes {text[start : start + 60]!r}")


def _parse(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
    """({computation: {instruction: its line}}, the entry computation)."""
    computations, entry, lines = {}, "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
            name, body = instruction.groups()
            end = _closing(body, 0) + 1 if body[0] == "(" else body.index(" ")
            opened = body.index("(", end)
            closed = _closing(body, opened)
            operands = tuple(re.findall(r"%([\w.\-]+)", body[opened:closed])) or (body[opened + 1 : closed],)
            lines[name] = _Line(body[:end], body[end:opened].strip(), operands, body[closed:])
    return computations, entry


def _called(line: _Line) -> list[str]:
    """The computations that an instruction calls."""
    return re.findall(r"(?:calls|to_apply|body|branch_computations=\{)=?%([\w.\-]+)", line.rest)


def _bytes_read(computations, lines: dict[str, _Line], line: _Line) -> int:
    """Bytes of the operands of an instruction, each fully, except those of which a fusion reads slices only."""
    read = {name: _size(lines[name].type) for name in line.operands if name in lines}
    if line.opcode == "fusion":
        inner = computations[_called(line)[0]]
        for name, each in inner.items():
            users = [user for user in inner.values() if name in user.operands]
            if each.opcode == "parameter" and users and all(user.opcode == "slice" for user in users):
                operand = line.operands[int(each.operands[0])]
                read[operand] = min(read[operand], sum(_size(user.type) for user in users))
    return sum(read.values())


def _loop_count(computations, line: _Line) -> int:
    """The iterations of a loop: the compiler's count, else the limit in its condition; 1 if neither is known."""
    if count := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(count.group(1))
    condition = computations[re.search(r"condition=%([\w.\-]+)", line.rest).group(1)].values()
    if not any(each.opcode == "compare" and "direction=LT" in each.rest for each in condition):
        return 1
    limits = [int(each.operands[0]) for each in condition if each.opcode == "constant" and each.operands[0].isdigit()]
    return limits[0] if len(limits) == 1 else 1


def _kind(computations, line: _Line) -> str:
    """The kind of the most expensive operation of an instruction."""
    if line.opcode == "custom-call":
        called = re.search(r'custom_call_target="([^"]*)"', line.rest).group(1)
        kinds = {"conv": "convolution", "matmul": "dot", "gemm": "dot", "fmha": "dot"}
        return next((kind for key, kind in kinds.items() if key in called), "other")
    if line.opcode.endswith("-start"):  # an asynchronous copy to a TPU's on-chip memory; its type repeats the source
        return "other"
    found, queue = set(), [line]
    while queue:
        inner = queue.pop()
        found.add(inner.opcode)
        if inner.opcode == "fusion":
            queue += [each for name in _called(inner) for each in computations[name].values()]
    return next((kind for kind, opcodes in _EXPENSIVE if opcodes & found), "element-wise")


def kernels(text: str) -> list[Kernel]:
    """The kernels of a compiled program, `compiled.as_text()`, in the order of the text."""
    computations, entry = _parse(text)

    def layout(line: _Line) -> str:
        candidates = [line, *(each for name in _called(line) for each in computations[name].values())]
        return next((m.group(1) for each in candidates if (m := re.search(r"dim_labels=(\w+->\w+)", each.rest))), "")

    def walk(name: str, runs: int) -> Iterator[Kernel]:
        lines = computations[name]
        for line in lines.values():
            if line.opcode in _FREE or line.opcode.endswith("-done"):
                continue
            if line.opcode in ("call", "while", "conditional") or line.opcode == "async-start":
                count = _loop_count(computations, line) if line.opcode == "while" else 1
                for called in _called(line):
                    yield from walk(called, runs * count)
                continue
            jax_name = re.search(r'op_name="([^"]*)"', line.rest)
            jax_name = jax_name.group(1) if jax_name else ""
            phase = "backward" if "transpose(" in jax_name else "forward" if "UNet" in jax_name else "rest"
            read = _bytes_read(computations, lines, line)
            kind = _kind(computations, line)
            written = 0 if kind == "other" and line.opcode.endswith("-start") else _size(line.type)
            dimensions = layout(line) if kind == "convolution" else ""
            yield Kernel(kind, phase, read + written, runs, jax_name, dimensions)

    return list(walk(entry, 1))


class Summary(NamedTuple):
    """Counts of the kernels of a program.

    count, bytes: by kind. phases: count by phase. norms, norm_bytes: the number and the bytes of the kernels of GroupNorm,
    SiLU and dropout that are not products. layouts: of the convolutions, the most frequent first.
    """

    count: dict[str, int]
    bytes: dict[str, int]
    phases: dict[str, int]
    norms: int
    norm_bytes: int
    layouts: list[tuple[str, int]]

    @property
    def kernels(self) -> int:
        """The number of kernels."""
        return sum(self.count.values())


def summary(kernels: list[Kernel], steps: int = 1) -> Summary:
    """A summary of kernels, divided by the number of steps of a program that is a loop of equal steps."""
    sums = collections.defaultdict(collections.Counter)
    for kernel in kernels:
        sums["count"][kernel.kind] += kernel.runs
        sums["bytes"][kernel.kind] += kernel.runs * kernel.bytes
        sums["phases"][kernel.phase] += kernel.runs
        if kernel.layout:
            sums["layouts"][kernel.layout] += kernel.runs
        elif re.search(r"/norm(\d|_out)?/|jit\(silu\)|Dropout", kernel.name) and kernel.kind not in (
            "convolution",
            "dot",
        ):
            sums["norms"].update(count=kernel.runs, bytes=kernel.runs * kernel.bytes)
    each = {name: {key: round(n / steps) for key, n in counter.most_common()} for name, counter in sums.items()}
    norms, layouts = each.get("norms", {}), each.get("layouts", {})
    totals = norms.get("count", 0), norms.get("bytes", 0)
    return Summary(each["count"], each["bytes"], each["phases"], *totals, list(layouts.items()))


# Assumptions for the expected time: good kernels reach 0.6 of the peak FLOPs and 0.8 of the peak bandwidth, and a GPU idles
# for 1.5 us between two small kernels in a CUDA graph.
REACHED_FLOPS, REACHED_BANDWIDTH, GAP = 0.6, 0.8, 1.5e-6


def seconds(summary: Summary, flops: float, tflops: float, bandwidth: float, gap: float) -> tuple[float, float]:
    """(least, expected) seconds of a step from its kernels: products at the peak FLOPs, then all others by their bytes.

    Products whose bytes take longer than their FLOPs are counted by their bytes. expected: with the shares of both peaks that
    good kernels reach, and `gap` seconds between kernels.
    """
    product_seconds = sum(summary.bytes.get(kind, 0) for kind in ("convolution", "dot")) / (bandwidth * 1e9)
    other_seconds = sum(summary.bytes.get(kind, 0) for kind in KINDS[2:]) / (bandwidth * 1e9)
    products = flops / (tflops * 1e12)
    least = max(products, product_seconds) + other_seconds
    expected = max(products / REACHED_FLOPS, product_seconds / REACHED_BANDWIDTH) + other_seconds / REACHED_BANDWIDTH
    return least, expected + summary.kernels * gap
