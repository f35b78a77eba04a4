"""This project beside torch.compile'd diffusers on a GPU (on a TPU alone): train steps, DDIM, and options one by one.

    make setup EXTRA=cuda && .venv/bin/pip install torch diffusers
    .venv/bin/python benchmarks/accelerator.py --output=TABLE.md
    .venv/bin/python benchmarks/accelerator.py --small    # where there is no accelerator: tiny networks, to see that it runs
    .venv/bin/python benchmarks/accelerator.py --hlo      # what XLA makes of the programs for chips that are not there; with
                                                          # KEEP_HLO=DIR in the environment it leaves them there

Every measurement has a process of its own, one after the other, so that neither library holds memory that the other needs;
jax takes memory as it goes (XLA_PYTHON_CLIENT_PREALLOCATE=false). A process makes one call (the time to it is "first call":
compilation, for the most part), warms up, and then times five stretches of calls, each waited for as a whole; the median
counts. Both train steps are L_simple's forward and backward pass, dropout, clipping, Adam and the EMA, on a batch that is on
the device; both samplers are DDIM over the same number of steps. "tf32" is float32 as both libraries run it on tensor cores;
bfloat16 is what layers compute in (torch: autocast), with float32 parameters. What fails gives a line, and the rest goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import accelerator_sides as sides
from benchmarks import compiled, roofline
from benchmarks.accelerator_sides import Case

PRECISIONS = ("float32", "tf32", "bfloat16")
BATCHES = {"cifar10": (64, 128, 256, 512), "adm64": (8, 16, 32, 64), "adm256": (1, 2, 4, 8)}
WINS = 1.03  # what an option must gain


@dataclasses.dataclass(frozen=True)
class Option:
    """One candidate beside the base. expected: what the compiled programs and others' reports let one expect."""

    name: str
    works: tuple[str, ...]
    expected: str
    place: str = "diffusion_jax/distributed/compiler.py"
    flags: str = ""
    changes: dict = dataclasses.field(default_factory=dict)
    batch: int = 1  # times the base's
    gpu_only: bool = True


OPTIONS = (
    Option(
        "NHWC for every convolution",
        ("train", "sample"),
        "nothing on Hopper and in bfloat16, which are NHWC already; before Hopper float32 is NCHW, of as many bytes: "
        "the convolutions alone decide",
        flags="--xla_gpu_force_conv_nhwc=true",
    ),
    Option(
        "convolutions in CUDA graphs",
        ("train", "sample"),
        "fewer gaps: a convolution ends a graph otherwise; most at small batches",
        flags="--xla_gpu_enable_command_buffer=+CONVOLUTION",
    ),
    Option(
        "convolutions and loops in CUDA graphs",
        ("sample",),
        "the loop's condition is no longer read by the host at each step",
        flags="--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
    ),
    Option(
        "no CUDA graphs",
        ("train", "sample"),
        "slower, by what graphs save: a launch of each kernel from the host",
        flags="--xla_gpu_enable_command_buffer=",
    ),
    Option(
        "ten steps a call",
        ("train",),
        "little, as calls are asynchronous; more where a step is shorter than its launch from Python",
        place="diffusion_jax/config: training.steps_per_call",
        changes={"steps_per_call": 10},
        gpu_only=False,
    ),
    Option(
        "twice the batch",
        ("train", "sample"),
        "the update's kernels and the gaps between all are spread over more images",
        place="the configs' batch sizes",
        batch=2,
        gpu_only=False,
    ),
    Option(
        "the state not donated",
        ("train",),
        "slower by one copy of the state at most; more memory by a state",
        place="donated already",
        changes={"donate": False},
        gpu_only=False,
    ),
)


def launch(case: Case, flags: str = "", timeout: float = 1800) -> dict:
    """Measures a case in a process of its own; {"error": a line} for one that fails."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="3")
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, __file__, f"--case={json.dumps(dataclasses.asdict(case))}"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if answers:
        return json.loads(answers[-1])
    said = done.stderr.strip().splitlines() or ["nothing was said"]
    return {"error": f"the process ended with {done.returncode}: {said[-1][:150]}"}


def row(*values) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def header(*names: str) -> tuple[str, str]:
    """The first two lines of one."""
    return row(*names), "|---" * len(names) + "|"


def rate(images_per_s: float) -> str:
    """Three digits at least."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def memory(result: dict) -> str:
    """Gigabytes at most, of the device; on a CPU of the process."""
    return f"{result['peak'] / 1e9:.2f}" if result.get("peak") else "?"


def share(result: dict, case: Case, tflops: float | None) -> str:
    """The MFU, in percent."""
    if not tflops:
        return "-"
    steps = 1 if case.work == "train" else case.steps
    return f"{roofline.utilization(result['gmac'] * 1e9 * steps, result['rate'], case.work == 'train', tflops):.1%}"


def side_by_side(cases: Iterable[Case], measure: Callable[..., dict], peak: Callable, libraries) -> Iterator[str]:
    """Lines of the table of throughput. cases: of either side; peak: precision -> TFLOP/s, or None."""
    found = "images/s", "MFU", "peak GB", "first call, s", "parameters", "GMAC", "ratio"
    yield from header("network", "work", "precision", "batch", "library", *found)
    for case in cases:
        rates = []
        for library in libraries:
            one = dataclasses.replace(case, library=library)
            found = measure(one)
            cells = [one.network, one.work, one.precision, one.batch, library + found.get("note", "")]
            if "error" in found:
                yield row(*cells, found["error"], *[""] * 6)
                continue
            rates.append(found["rate"])
            ratio = f"{rates[0] / rates[1]:.2f}" if len(rates) == 2 else ""
            cells += [rate(found["rate"]), share(found, one, peak(one.precision)), memory(found)]
            yield row(*cells, f"{found['first']:.1f}", f"{found['parameters']:,}", f"{found['gmac']:.2f}", ratio)


def verdict(option: Option, ratios: list[float]) -> str:
    """What the ratios of rates, the option's over the base's in each round, say of it."""
    ratio = statistics.median(ratios)
    if ratio > WINS and min(ratios) > 1:
        return f"wins: make it the default ({option.place})"
    return "loses" if ratio < 1 / WINS and max(ratios) < 1 else "no difference"


def options_table(bases: Iterable[Case], measure: Callable[..., dict], rounds: int, platform: str) -> Iterator[str]:
    """Lines of the A/B list: each option against the base, in turn, `rounds` times; medians of the ratios.

    A CPU runs the options of GPUs, too, to see that they are known; that says nothing of them.
    """
    found = "base, images/s", "option, images/s", "ratio", "peak GB", "verdict", "expected"
    yield from header("network", "work", "precision", "option", *found)
    for base in bases:
        tried = [option for option in OPTIONS if base.work in option.works]
        measured: dict[str, list[dict]] = {option.name: [] for option in tried} | {"base": []}
        for _ in range(rounds):
            measured["base"].append(measure(base))
            for option in tried:
                changed = {"batch": base.batch * option.batch, "changes": base.changes | option.changes}
                if platform != "tpu" or not option.gpu_only:
                    measured[option.name].append(measure(dataclasses.replace(base, **changed), option.flags))
        for option in tried:
            cells = [base.network, base.work, base.precision, option.name]
            pairs = list(zip(measured["base"], measured[option.name], strict=False))
            bad = next((one["error"] for pair in pairs for one in pair if "error" in one), None)
            if not pairs or bad:
                yield row(*cells, "", bad or "left out: an option of GPUs", "", "", "", option.expected)
                continue
            rates = [rate(statistics.median(one["rate"] for one in side)) for side in zip(*pairs, strict=True)]
            ratios = [other["rate"] / one["rate"] for one, other in pairs]
            judged = verdict(option, ratios) if platform != "cpu" or not option.gpu_only else "not judged on a CPU"
            yield row(*cells, *rates, f"{statistics.median(ratios):.3f}", memory(pairs[0][1]), judged, option.expected)


def parts_table(network: str, batch: int, measure: Callable[..., dict], small: bool, seconds: float) -> Iterator[str]:
    """Lines of the table of single layers, forward and backward, in bfloat16 and as float32 runs by default."""
    yield from header("layer", "precision", "microseconds", "TFLOP/s", "GB/s", "error against float32")
    for part in sides.PARTS:
        for precision in ("tf32", "bfloat16"):
            found = measure(Case(network, part, precision, batch, small=small, seconds=seconds))
            if "error" in found:
                yield row(part, precision, found["error"], "", "", "")
                continue
            flops, moved = (found[name] / found["call"] for name in ("flops", "bytes"))
            rates = f"{found['call'] * 1e6:,.0f}", f"{flops / 1e12:.3g}", f"{moved / 1e9:,.0f}"
            yield row(part, precision, *rates, f"{found['deviation']:.1e}")


def hlo_table(cases: Iterable[Case], targets: Iterable[str], measure: Callable[..., dict]) -> Iterator[str]:
    """Lines of the table of compiled programs, with a roofline's prediction where the target's peaks are known."""
    found = "kernels", *compiled.KINDS, *compiled.PHASES, "norm, SiLU", "GB", "norm, SiLU", "convolutions"
    yield from header(
        "target", "network", "work", "precision", "batch", *found, "least, ms", "expected, ms", "predicted images/s"
    )
    for target in targets:
        for case in cases:
            found = measure(dataclasses.replace(case, library="hlo", changes={"target": target}))
            cells = [target, case.network, case.work, case.precision, case.batch]
            if "error" in found:
                yield row(*cells, found["error"], *[""] * (8 + len(compiled.KINDS) + len(compiled.PHASES)))
                continue
            read = compiled.Summary(**found["summary"])
            cells += [read.kernels, *(read.count.get(kind, 0) for kind in compiled.KINDS)]
            cells += [*(read.phases.get(phase, 0) for phase in compiled.PHASES), read.norms]
            cells += [f"{sum(read.bytes.values()) / 1e9:.2f}", f"{read.norm_bytes / 1e9:.2f}"]
            cells.append(", ".join(f"{name} {n}" for name, n in read.layouts))
            card = roofline.card(found["kind"])
            tflops = card and getattr(card, case.precision)
            if not tflops:
                yield row(*cells, "", "", "")
                continue
            flops = (3 if case.work == "train" else 1) * 2e9 * found["gmac"] * case.batch
            gap = 0 if card.name.startswith("TPU") else compiled.GAP
            least, expected = compiled.seconds(read, flops, tflops, card.bandwidth, gap)
            images = case.batch / (case.steps if case.work == "sample" else 1)
            predicted = f"{rate(images / expected)} (at most {rate(images / least)})"
            yield row(*cells, f"{least * 1e3:.2f}", f"{expected * 1e3:.2f}", predicted)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = {"type": lambda text: tuple(text.split(","))}
    parser.add_argument("--networks", **listed, default=sides.NETWORKS, help=", ".join(sides.NETWORKS))
    parser.add_argument("--works", **listed, default=("train", "sample"))
    parser.add_argument("--precisions", **listed, default=("tf32", "bfloat16"), help=", ".join(PRECISIONS))
    parser.add_argument("--batch_sizes", type=lambda text: tuple(map(int, text.split(","))), help="of every network")
    parser.add_argument("--tables", **listed, default=("side_by_side", "options", "parts"))
    parser.add_argument("--libraries", **listed, default=("ours", "torch"))
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=3, help="of the table of options")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed calls in a process")
    parser.add_argument("--peak_tflops", type=float, help="the chip's, where the table of cards has it not")
    parser.add_argument("--torch_mode", default="default", help="of torch.compile, or eager")
    parser.add_argument("--small", action="store_true", help="tiny networks; so, too, where there is no accelerator")
    parser.add_argument("--hlo", action="store_true", help="compile for the targets and read the programs; run nothing")
    parser.add_argument("--targets", **listed, default=("h100", "v5e"), help=", ".join(compiled.TARGETS))
    parser.add_argument("--output", help="a Markdown file of the tables")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, known in (
        ("networks", sides.NETWORKS),
        ("works", ("train", "sample")),
        ("precisions", PRECISIONS),
        ("tables", ("side_by_side", "options", "parts")),
        ("libraries", ("ours", "torch")),
        ("targets", compiled.TARGETS),
    ):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def report(options: argparse.Namespace, measure: Callable[..., dict]) -> Iterator[str]:
    """Every line of the report, as it is found. measure: (case, XLA flags) -> a result, `launch` but in tests."""
    machine = measure(Case("cifar10", "device", "tf32", 1))
    if "error" in machine:
        raise SystemExit(f"jax does not start here: {machine['error']}")
    platform, small = machine["platform"], options.small or options.hlo
    yield f"{machine['kind']}; {machine['versions']}; {datetime.date.today().isoformat()}"
    if platform == "cpu" and not small:
        yield "No accelerator is here: tiny networks instead (--small), which say nothing of an accelerator."
        small = True
    libraries = options.libraries
    if platform == "tpu" and "torch" in libraries:
        yield "PyTorch is left out: it has no TPU here."
        libraries = tuple(name for name in libraries if name != "torch")
    if platform == "cpu" and not options.hlo:
        yield "Peak GB are the whole process's, as a CPU's memory is not counted by program."
    card = roofline.card(machine["kind"])
    if not (card or options.peak_tflops or options.hlo):
        yield "The peak of this chip is not known: MFU is left out (--peak_tflops)."

    def peak(precision: str) -> float | None:
        return options.peak_tflops or (getattr(card, precision) if card else None)

    def cases(networks, precisions, batches: Callable) -> list[Case]:
        shared = {"steps": options.steps, "seconds": options.seconds, "mode": options.torch_mode}
        shared |= {"small": small and not options.hlo}
        return [
            Case(network, work, precision, batch, **shared)
            for network in networks
            for work in options.works
            for precision in precisions
            for batch in batches(network)
        ]

    def sizes(network: str) -> tuple[int, ...]:
        return options.batch_sizes or ((2, 4) if small and not options.hlo else BATCHES[network])

    def middle(network: str) -> tuple[int, ...]:
        return sizes(network)[len(sizes(network)) // 2 :][:1]

    if options.hlo:
        yield "Predictions from a roofline, not measurements: see benchmarks/compiled.py for what they assume."
        yield from hlo_table(cases(options.networks, options.precisions, middle), options.targets, measure)
        return
    if "side_by_side" in options.tables:
        yield from ("", *side_by_side(cases(options.networks, options.precisions, sizes), measure, peak, libraries))
    if "options" in options.tables:
        bases = cases(options.networks[:1], options.precisions, middle)
        yield from ("", *options_table(bases, measure, options.rounds, platform))
    if "parts" in options.tables:
        network = options.networks[0]
        yield from ("", *parts_table(network, middle(network)[0], measure, small, options.seconds))


def main(arguments: list[str] | None = None) -> None:
    """Prints the report, or measures one case."""
    options = parse(arguments)
    if options.case:
        print(json.dumps(sides.measure(Case(**json.loads(options.case)))))
        return
    # Later rounds of a program read it from here; its first call is its compilation all the same.
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
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
