"""Measures train steps and DDIM on a GPU or TPU; on GPUs, compares with diffusers under torch.compile.

    make setup EXTRA=cuda && .venv/bin/pip install torch diffusers
    .venv/bin/python benchmarks/accelerator.py --output=TABLE.md
    .venv/bin/python benchmarks/accelerator.py --small    # without an accelerator: tiny networks, to check the script

Measurements run one after the other in separate processes, so that neither library holds memory that the other library
needs; JAX allocates memory as needed (XLA_PYTHON_CLIENT_PREALLOCATE=false). A process makes one call ("first call", mostly
compilation), warms up and times five series of calls, with one wait after each series; the result is the median. Both train
steps are L_simple's forward and backward pass, dropout, clipping, Adam and the EMA, on a batch in device memory; both
samplers are DDIM with equally many steps. "tf32" is float32 on tensor cores, in both libraries; bfloat16 is the layers'
dtype (torch: autocast), with float32 parameters. If a measurement fails, a line is printed, and all other measurements
continue.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import accelerator_cases, roofline
from benchmarks.accelerator_cases import Case

PRECISIONS = ("float32", "tf32", "bfloat16")
BATCHES = {"cifar10": (64, 128, 256, 512), "adm64": (8, 16, 32, 64), "adm256": (1, 2, 4, 8)}


def launch(case: Case, timeout: float = 1800) -> dict:
    """Measures a case in a separate process; returns {"error": one line} if it fails."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="3")
    command = [sys.executable, __file__, f"--case={json.dumps(dataclasses.asdict(case))}"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"timeout after {timeout:.0f} s"}
    results = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if results:
        return json.loads(results[-1])
    errors = done.stderr.strip().splitlines() or ["no output"]
    return {"error": f"exit code {done.returncode}: {errors[-1][:150]}"}


def row(*values) -> str:
    """Returns a line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def header(*names: str) -> tuple[str, str]:
    """Returns the first two lines of a Markdown table."""
    return row(*names), "|---" * len(names) + "|"


def rate(images_per_s: float) -> str:
    """Formats a rate with at least three digits."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def memory(result: dict) -> str:
    """Formats the peak memory in gigabytes: the device's memory, or on a CPU the process's."""
    return f"{result['peak'] / 1e9:.2f}" if result.get("peak") else "?"


def mfu(result: dict, case: Case, tflops: float | None) -> str:
    """Formats the model FLOP utilization in percent."""
    if not tflops:
        return "-"
    steps = 1 if case.work == "train" else case.steps
    return f"{roofline.utilization(result['gmac'] * 1e9 * steps, result['rate'], case.work == 'train', tflops):.1%}"


def side_by_side(cases: Iterable[Case], measure: Callable[..., dict], peak: Callable, libraries) -> Iterator[str]:
    """Yields lines of the throughput table. cases: measured with each library. peak: precision -> TFLOP/s, or None."""
    columns = "images/s", "MFU", "peak GB", "first call, s", "parameters", "GMAC", "ratio"
    yield from header("network", "work", "precision", "batch", "library", *columns)
    for case in cases:
        rates = []
        for library in libraries:
            variant = dataclasses.replace(case, library=library)
            result = measure(variant)
            cells = [case.network, case.work, case.precision, case.batch, library + result.get("note", "")]
            if "error" in result:
                yield row(*cells, result["error"], *[""] * 6)
                continue
            rates.append(result["rate"])
            ratio = f"{rates[0] / rates[1]:.2f}" if len(rates) == 2 else ""
            cells += [rate(result["rate"]), mfu(result, variant, peak(variant.precision)), memory(result)]
            yield row(*cells, f"{result['first']:.1f}", f"{result['parameters']:,}", f"{result['gmac']:.2f}", ratio)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comma_separated = {"type": lambda text: tuple(text.split(","))}
    parser.add_argument(
        "--networks", **comma_separated, default=accelerator_cases.NETWORKS, help=", ".join(accelerator_cases.NETWORKS)
    )
    parser.add_argument("--works", **comma_separated, default=("train", "sample"))
    parser.add_argument("--precisions", **comma_separated, default=("tf32", "bfloat16"), help=", ".join(PRECISIONS))
    parser.add_argument("--batch_sizes", type=lambda text: tuple(map(int, text.split(","))), help="for every network")
    parser.add_argument("--libraries", **comma_separated, default=("ours", "torch"))
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a measurement's timed calls")
    parser.add_argument("--peak_tflops", type=float, help="of the chip, if it is not in the table of cards")
    parser.add_argument("--torch_mode", default="default", help="of torch.compile, or eager")
    parser.add_argument("--small", action="store_true", help="tiny networks; the default without an accelerator")
    parser.add_argument("--output", help="the Markdown file to write")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, known in (
        ("networks", accelerator_cases.NETWORKS),
        ("works", ("train", "sample")),
        ("precisions", PRECISIONS),
        ("libraries", ("ours", "torch")),
    ):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def report(options: argparse.Namespace, measure: Callable[[Case], dict]) -> Iterator[str]:
    """Yields the lines of the report. measure: case -> results, as `launch`."""
    machine = measure(Case("cifar10", "device", "tf32", 1))
    if "error" in machine:
        raise SystemExit(f"jax cannot start: {machine['error']}")
    platform, small = machine["platform"], options.small
    yield f"{machine['kind']}; {machine['versions']}; {datetime.date.today().isoformat()}"
    if platform == "cpu" and not small:
        yield "No accelerator found: tiny networks (--small) on the CPU; the numbers do not describe an accelerator."
        small = True
    libraries = options.libraries
    if platform == "tpu" and "torch" in libraries:
        yield "PyTorch is skipped: it does not run on TPUs here."
        libraries = tuple(name for name in libraries if name != "torch")
    if platform == "cpu":
        yield "Peak GB is of the whole process: a CPU's memory is not counted by program."
    card = roofline.card(machine["kind"])
    if not (card or options.peak_tflops):
        yield "The peak of this chip is unknown, so there is no MFU; give --peak_tflops."

    def peak(precision: str) -> float | None:
        return options.peak_tflops or (getattr(card, precision) if card else None)

    shared = {"steps": options.steps, "seconds": options.seconds, "mode": options.torch_mode, "small": small}
    cases = [
        Case(network, work, precision, batch, **shared)
        for network in options.networks
        for work in options.works
        for precision in options.precisions
        for batch in options.batch_sizes or ((2, 4) if small else BATCHES[network])
    ]
    yield from ("", *side_by_side(cases, measure, peak, libraries))


def main(arguments: list[str] | None = None) -> None:
    """Prints the report, or measures one case."""
    options = parse(arguments)
    if options.case:
        print(json.dumps(accelerator_cases.measure(Case(**json.loads(options.case)))))
        return
    # The first call in a program's first round compiles the program; later rounds read it from this cache.
    cache = tempfile.mkdtemp()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    output = open(options.output, "w") if options.output else None
    started = time.perf_counter()
    try:
        for line in report(options, launch):
            print(line, flush=True)
            if output:
                print(line, file=output, flush=True)
    finally:
        shutil.rmtree(cache)
        if output:
            output.close()
    print(f"total: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
