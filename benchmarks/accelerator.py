"""Train steps, DDIM and options of this project on a GPU or TPU, compared on GPUs with diffusers under torch.compile.

    make setup EXTRA=cuda && .venv/bin/pip install torch diffusers
    .venv/bin/python benchmarks/accelerator.py --output=TABLE.md
    .venv/bin/python benchmarks/accelerator.py --small    # without an accelerator: tiny networks, to check that it runs
    .venv/bin/python benchmarks/accelerator.py --hlo      # kernels of programs compiled for chips that need not be present;
                                                          # KEEP_HLO=DIR in the environment also writes the programs

Every measurement runs in a separate process, one after the other, so that neither library holds memory that the other
needs; jax allocates memory as needed (XLA_PYTHON_CLIENT_PREALLOCATE=false). A process makes one call ("first call", mostly
compilation), warms up and times five series of calls, with one wait after each series; the result is the median. Both train
steps are L_simple's forward and backward pass, dropout, clipping, Adam and the EMA, on a batch in device memory; both
samplers are DDIM with the same number of steps. "tf32" is float32 on tensor cores, in both libraries; bfloat16 is the dtype
of the layers (torch: autocast), with float32 parameters. A measurement that fails gives a line, and the others continue.
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

from benchmarks import accelerator_cases, compiled, roofline
from benchmarks.accelerator_cases import Case

PRECISIONS = ("float32", "tf32", "bfloat16")
TABLES = ("side_by_side", "options", "layers")
BATCHES = {"cifar10": (64, 128, 256, 512), "adm64": (8, 16, 32, 64), "adm256": (1, 2, 4, 8)}
MIN_GAIN = 1.03  # the ratio of rates above which an option is faster


@dataclasses.dataclass(frozen=True)
class Option:
    """A change that is compared with the base. expected: its effect according to compiled programs and published reports."""

    name: str
    works: tuple[str, ...]
    expected: str
    place: str = "diffusion_jax/distributed/compiler.py"
    flags: str = ""
    changes: dict = dataclasses.field(default_factory=dict)
    batch: int = 1  # multiplies the batch of the base
    gpu_only: bool = True


OPTIONS = (
    Option(
        "NHWC for every convolution",
        ("train", "sample"),
        "none on Hopper and in bfloat16, which are NHWC already; before Hopper float32 is NCHW with as many bytes, so only "
        "the convolutions matter",
        flags="--xla_gpu_force_conv_nhwc=true",
    ),
    Option(
        "convolutions in CUDA graphs",
        ("train", "sample"),
        "fewer gaps, as otherwise a convolution ends a graph; largest at small batches",
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
        "slower: the host launches each kernel",
        flags="--xla_gpu_enable_command_buffer=",
    ),
    Option(
        "ten steps per call",
        ("train",),
        "small, as calls are asynchronous; larger if a step is shorter than its launch from Python",
        place="diffusion_jax/config: training.steps_per_call",
        changes={"steps_per_call": 10},
        gpu_only=False,
    ),
    Option(
        "twice the batch",
        ("train", "sample"),
        "the kernels of the update and the gaps are shared by more images",
        place="the configs' batch sizes",
        batch=2,
        gpu_only=False,
    ),
    Option(
        "the state not donated",
        ("train",),
        "slower by at most one copy of the state; needs the memory of a second state",
        place="donated already",
        changes={"donate": False},
        gpu_only=False,
    ),
)


def launch(case: Case, flags: str = "", timeout: float = 1800) -> dict:
    """The results of a case, measured in a separate process; {"error": a line} if it fails."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="3")
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
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
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def header(*names: str) -> tuple[str, str]:
    """The first two lines of a Markdown table."""
    return row(*names), "|---" * len(names) + "|"


def rate(images_per_s: float) -> str:
    """A rate with three digits or more."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def memory(result: dict) -> str:
    """Peak gigabytes of the device, or of the process on a CPU."""
    return f"{result['peak'] / 1e9:.2f}" if result.get("peak") else "?"


def mfu(result: dict, case: Case, tflops: float | None) -> str:
    """The model FLOP utilization in percent."""
    if not tflops:
        return "-"
    steps = 1 if case.work == "train" else case.steps
    return f"{roofline.utilization(result['gmac'] * 1e9 * steps, result['rate'], case.work == 'train', tflops):.1%}"


def side_by_side(cases: Iterable[Case], measure: Callable[..., dict], peak: Callable, libraries) -> Iterator[str]:
    """Lines of the table of throughput. cases: measured with each library; peak: precision -> TFLOP/s, or None."""
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


def verdict(option: Option, ratios: list[float]) -> str:
    """The conclusion from the ratios of rates, option / base in each round."""
    ratio = statistics.median(ratios)
    if ratio > MIN_GAIN and min(ratios) > 1:
        return f"faster: make it the default ({option.place})"
    return "slower" if ratio < 1 / MIN_GAIN and max(ratios) < 1 else "no difference"


def options_table(bases: Iterable[Case], measure: Callable[..., dict], rounds: int, platform: str) -> Iterator[str]:
    """Lines of the table of options: each option and the base, measured alternately `rounds` times; medians of the ratios.

    A CPU also runs the options of GPUs, only to check that they are accepted.
    """
    columns = "base, images/s", "option, images/s", "ratio", "peak GB", "verdict", "expected"
    yield from header("network", "work", "precision", "option", *columns)
    for base in bases:
        options = [option for option in OPTIONS if base.work in option.works]
        measured: dict[str, list[dict]] = {option.name: [] for option in options} | {"base": []}
        for _ in range(rounds):
            measured["base"].append(measure(base))
            for option in options:
                changed = {"batch": base.batch * option.batch, "changes": base.changes | option.changes}
                if platform != "tpu" or not option.gpu_only:
                    measured[option.name].append(measure(dataclasses.replace(base, **changed), option.flags))
        for option in options:
            cells = [base.network, base.work, base.precision, option.name]
            pairs = list(zip(measured["base"], measured[option.name], strict=False))
            error = next((result["error"] for pair in pairs for result in pair if "error" in result), None)
            if not pairs or error:
                yield row(*cells, "", error or "skipped: an option of GPUs", "", "", "", option.expected)
                continue
            rates = [
                rate(statistics.median(result["rate"] for result in results)) for results in zip(*pairs, strict=True)
            ]
            ratios = [option_result["rate"] / base_result["rate"] for base_result, option_result in pairs]
            conclusion = verdict(option, ratios) if platform != "cpu" or not option.gpu_only else "unknown on a CPU"
            yield row(
                *cells, *rates, f"{statistics.median(ratios):.3f}", memory(pairs[0][1]), conclusion, option.expected
            )


def layers_table(network: str, batch: int, measure: Callable[..., dict], small: bool, seconds: float) -> Iterator[str]:
    """Lines of the table of single layers, forward and backward, in bfloat16 and in the default precision of float32."""
    yield from header("layer", "precision", "microseconds", "TFLOP/s", "GB/s", "error against float32")
    for layer in accelerator_cases.LAYERS:
        for precision in ("tf32", "bfloat16"):
            result = measure(Case(network, layer, precision, batch, small=small, seconds=seconds))
            if "error" in result:
                yield row(layer, precision, result["error"], "", "", "")
                continue
            flops, moved = (result[name] / result["call"] for name in ("flops", "bytes"))
            rates = f"{result['call'] * 1e6:,.0f}", f"{flops / 1e12:.3g}", f"{moved / 1e9:,.0f}"
            yield row(layer, precision, *rates, f"{result['deviation']:.1e}")


def hlo_table(cases: Iterable[Case], targets: Iterable[str], measure: Callable[..., dict]) -> Iterator[str]:
    """Lines of the table of compiled programs, with a roofline's prediction if the peaks of the target are known."""
    columns = "kernels", *compiled.KINDS, *compiled.PHASES, "norm, SiLU", "GB", "norm, SiLU", "convolutions"
    yield from header(
        "target", "network", "work", "precision", "batch", *columns, "least, ms", "expected, ms", "predicted images/s"
    )
    for target in targets:
        for case in cases:
            result = measure(dataclasses.replace(case, library="hlo", changes={"target": target}))
            cells = [target, case.network, case.work, case.precision, case.batch]
            if "error" in result:
                yield row(*cells, result["error"], *[""] * (8 + len(compiled.KINDS) + len(compiled.PHASES)))
                continue
            summary = compiled.Summary(**result["summary"])
            cells += [summary.kernels, *(summary.count.get(kind, 0) for kind in compiled.KINDS)]
            cells += [*(summary.phases.get(phase, 0) for phase in compiled.PHASES), summary.norms]
            cells += [f"{sum(summary.bytes.values()) / 1e9:.2f}", f"{summary.norm_bytes / 1e9:.2f}"]
            cells.append(", ".join(f"{name} {n}" for name, n in summary.layouts))
            card = roofline.card(result["kind"])
            tflops = card and getattr(card, case.precision)
            if not tflops:
                yield row(*cells, "", "", "")
                continue
            flops = (3 if case.work == "train" else 1) * 2e9 * result["gmac"] * case.batch
            gap = 0 if card.name.startswith("TPU") else compiled.GAP
            least, expected = compiled.seconds(summary, flops, tflops, card.bandwidth, gap)
            images = case.batch / (case.steps if case.work == "sample" else 1)
            predicted = f"{rate(images / expected)} (at most {rate(images / least)})"
            yield row(*cells, f"{least * 1e3:.2f}", f"{expected * 1e3:.2f}", predicted)


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
    parser.add_argument("--tables", **comma_separated, default=TABLES, help=", ".join(TABLES))
    parser.add_argument("--libraries", **comma_separated, default=("ours", "torch"))
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=3, help="of the table of options")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of the timed calls of a measurement")
    parser.add_argument("--peak_tflops", type=float, help="of the chip, if it is not in the table of cards")
    parser.add_argument("--torch_mode", default="default", help="of torch.compile, or eager")
    parser.add_argument("--small", action="store_true", help="tiny networks; the default without an accelerator")
    parser.add_argument("--hlo", action="store_true", help="compile for the targets and count kernels; run nothing")
    parser.add_argument("--targets", **comma_separated, default=("h100", "v5e"), help=", ".join(compiled.TARGETS))
    parser.add_argument("--output", help="the Markdown file to write")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, known in (
        ("networks", accelerator_cases.NETWORKS),
        ("works", ("train", "sample")),
        ("precisions", PRECISIONS),
        ("tables", TABLES),
        ("libraries", ("ours", "torch")),
        ("targets", compiled.TARGETS),
    ):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def report(options: argparse.Namespace, measure: Callable[..., dict]) -> Iterator[str]:
    """The lines of the report. measure: (case, XLA flags) -> results, as `launch`."""
    machine = measure(Case("cifar10", "device", "tf32", 1))
    if "error" in machine:
        raise SystemExit(f"jax cannot start: {machine['error']}")
    platform, small = machine["platform"], options.small or options.hlo
    yield f"{machine['kind']}; {machine['versions']}; {datetime.date.today().isoformat()}"
    if platform == "cpu" and not small:
        yield "No accelerator found: tiny networks (--small), whose numbers are not those of an accelerator."
        small = True
    libraries = options.libraries
    if platform == "tpu" and "torch" in libraries:
        yield "PyTorch is skipped: it does not run on TPUs here."
        libraries = tuple(name for name in libraries if name != "torch")
    if platform == "cpu" and not options.hlo:
        yield "Peak GB is of the whole process: a CPU's memory is not counted by program."
    card = roofline.card(machine["kind"])
    if not (card or options.peak_tflops or options.hlo):
        yield "The peak of this chip is unknown, so there is no MFU; give --peak_tflops."

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
        yield "Predictions from a roofline, not measurements; benchmarks/compiled.py has the assumptions."
        yield from hlo_table(cases(options.networks, options.precisions, middle), options.targets, measure)
        return
    if "side_by_side" in options.tables:
        yield from ("", *side_by_side(cases(options.networks, options.precisions, sizes), measure, peak, libraries))
    if "options" in options.tables:
        bases = cases(options.networks[:1], options.precisions, middle)
        yield from ("", *options_table(bases, measure, options.rounds, platform))
    if "layers" in options.tables:
        network = options.networks[0]
        yield from ("", *layers_table(network, middle(network)[0], measure, small, options.seconds))


def main(arguments: list[str] | None = None) -> None:
    """Prints the report, or measures one case."""
    options = parse(arguments)
    if options.case:
        print(json.dumps(accelerator_cases.measure(Case(**json.loads(options.case)))))
        return
    # Later rounds of a program read it from this cache; the first call of its first round compiles it.
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
