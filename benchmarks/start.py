"""Measures startup: the import, the first train step without and with a compilation cache, and program sizes.

    python benchmarks/start.py [--parts=import,step,command,programs] [--pairs=7] [--presets=ddpm_cifar10,...]
    python benchmarks/start.py --parts=refusals,demo,data [--data_dir=DIR] [--steps=1500] [--root=OTHER_CLONE]

import: `import diffusion_jax` after `import jax`, in separate processes; the median.
step: the stages up to the first train step of configs/digits.py, timed from a separate process's start. The cache is a
temporary folder that is empty for the first process.
command: `main.py --config=configs/digits.py` until the first step is in metrics.jsonl.
programs: the number of equations, including nested equations, in the train step and in 50 DDIM steps for 2 images, and the
CPU seconds to trace and lower the programs; with --compile, also to compile. --presets selects networks.
refusals: CPU seconds for `--help` and for invalid command lines.
demo: the three commands of `make demo` with empty caches, with `--steps` train steps.
data: loads CIFAR-10 from a TFDS directory in separate processes, with an empty and with a full cache for decoded images.
--root runs refusals, demo and data with another clone's code, to compare two versions.
"""

import argparse
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PIXELS = {"ddpm_cifar10": 32, "adm_imagenet64": 64, "adm_imagenet256": 256, "adm_imagenet512": 512}

_IMPORT = "import time, jax; s = time.perf_counter(); {}; print(time.perf_counter() - s)"

_FIRST_STEP = """
import json, sys, time
marks = [("python", time.time())]
def mark(part):
    marks.append((part, time.time()))
from diffusion_jax import cli
from diffusion_jax import data, training
from diffusion_jax.distributed import devices
from diffusion_jax.runs import train
mark("import")
devices.silence_libraries()
devices.start()
mark("devices")
from configs import digits
config = digits.get_config()
built = training.build_program(config)
mark("set-up")
source = data.load(config.data)
batch = next(data.stream(data.Batches(source, config.seed, config.training.batch_size, 1)))
mark("data")
import jax
state = jax.block_until_ready(built.init())
mark("initialization")
lowered = built.train_step.lower(state, batch)
mark("tracing")
compiled = lowered.compile()
mark("compiling or loading")
jax.block_until_ready(compiled(state, batch))
mark("the step")
print(json.dumps(marks))
"""


def run(arguments: list[str], **environment: str) -> str:
    """Runs a separate Python process, and returns the output."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def imports(pairs: int) -> None:
    """Prints the import time."""
    alone = float(run(["-c", "import time; s = time.perf_counter(); import jax; print(time.perf_counter() - s)"]))
    seconds = [float(run(["-c", _IMPORT.format("import diffusion_jax")])) for _ in range(pairs)]
    print(
        f"import diffusion_jax after import jax: {statistics.median(seconds):.3f} s ({alone:.3f} s for jax)", flush=True
    )


def first_step() -> None:
    """Prints a table of the phases, with an empty and with a full cache."""
    columns = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "full cache"):
            start = time.time()
            marks = json.loads(run(["-c", _FIRST_STEP], XDG_CACHE_HOME=cache).splitlines()[-1])
            ends = [start, *(end for _, end in marks)]
            columns[name] = [after - before for before, after in itertools.pairwise(ends)]
            columns[name].append(ends[-1] - start)
    print(f"| | {' | '.join(columns)} |\n|---|---|---|")
    for part, *seconds in zip([*(part for part, _ in marks), "total"], *columns.values(), strict=True):
        print(f"| {part} | " + " | ".join(f"{s:.2f} s" for s in seconds) + " |", flush=True)


def command() -> None:
    """Prints the seconds until the log has the line of the first step."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "full cache"):
            with tempfile.TemporaryDirectory() as workdir:
                log = pathlib.Path(workdir) / "metrics.jsonl"
                options = ["--config.training.num_steps=1", "--config.sampling.preview_samples=0"]
                arguments = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={workdir}", *options]
                start = time.time()
                process = subprocess.Popen(
                    arguments, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": cache}, stdout=subprocess.DEVNULL
                )
                while process.poll() is None and not (log.exists() and log.stat().st_size):
                    time.sleep(0.01)
                print(f"main.py to the line of the first step, {name}: {time.time() - start:.1f} s", flush=True)
                process.wait()


def timed(arguments: list[str], root: str, **environment: str) -> str:
    """Times a separate Python process with any exit code; returns text such as "2.1 s, 3.4 s CPU"."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    variables = os.environ | {"PYTHONPATH": root} | environment
    subprocess.run([sys.executable, *arguments], cwd=root, env=variables, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{time.time() - start:.1f} s, {cpu:.2f} s CPU"


def refusals(root: str) -> None:
    """Prints a line for `--help` and for each refusal."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = f"--workdir={directory}/run"
        for arguments in (
            ["--help"],
            ["--config=nothing", workdir],
            ["--config=digits", workdir, "--mode=trein"],
            ["--config=digits", workdir, "--config.training.batch_size=-3"],
            [workdir],
            ["--config=digits", workdir, "--config.data.dataset=nothing"],
            ["--config=digits", workdir, "--config.data.dataset=folder", "--config.data.data_dir=nothing"],
            ["--config=digits", workdir, "--mode=sample"],
            ["--config=digits", workdir, "--mode=evaluate"],
        ):
            shown = " ".join(arguments).replace(directory, "DIR")
            print(f"| {shown} | {timed(['main.py', *arguments], root)} |", flush=True)


def demo(root: str, steps: int) -> None:
    """Prints a line for each command of `make demo`."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = f"--workdir={directory}/run"
        few = ["--config.evaluation.likelihood=False", "--config.evaluation.num_samples=100"]
        for name, *arguments in (
            ("train", "--config=configs/digits.py", f"--config.training.num_steps={steps}"),
            ("sample", "--mode=sample"),
            ("evaluate", "--mode=evaluate", *few),
        ):
            seconds = timed(["main.py", workdir, *arguments], root, XDG_CACHE_HOME=f"{directory}/cache")
            print(f"| {name}, {steps} steps | {seconds} |", flush=True)


_LOAD = """
import sys, time
from diffusion_jax import data
start, before = time.time(), time.process_time()
data.load({"dataset": "cifar10", "data_dir": sys.argv[1]})
print(f"{time.time() - start:.2f} s, {time.process_time() - before:.2f} s CPU")
"""


def decoded_data(root: str, data_dir: str) -> None:
    """Prints the time to load CIFAR-10 with an empty and with a full cache."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "full cache"):
            out = run(["-c", _LOAD, data_dir], XDG_CACHE_HOME=cache, PYTHONPATH=root)
            print(f"| CIFAR-10, {name} | {out.splitlines()[-1]} |", flush=True)


def programs(presets: list[str], compiled: bool) -> None:
    """Prints two lines for each network: train step, and sampler with 50 DDIM steps; times are CPU seconds."""
    from diffusion_jax import models, training
    from diffusion_jax.config import default
    from diffusion_jax.config.presets import UNET_PRESETS
    from diffusion_jax.distributed import devices

    devices.collect_garbage_rarely()  # `devices.start` would also use the compilation cache
    columns = ["equations", "tracing", "lowering", *["compiling"] * compiled]
    print(f"| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name in presets:
        config = default()
        config.model.update(UNET_PRESETS[name] | {"out_channels": None})
        config.data.image_size = PIXELS[name]
        config.training.batch_size = 2
        if models.preset(name).out_channels == 6:
            config.diffusion.update(variance="learned_range", loss="hybrid")
        built = training.build_program(config)
        for work, program, arguments in (
            ("train step", *_train_step(config, built)),
            ("sampler", *_sampler(config, built)),
        ):
            count, seconds = _stages(program, arguments, compiled)
            print(f"| {name}, {work} | {count:,} | " + " | ".join(f"{s:.1f} s" for s in seconds) + " |", flush=True)


def _shapes(config, dtype: str) -> tuple:
    """Returns the shapes of 2 images and their labels."""
    import jax

    from diffusion_jax import data

    images = jax.ShapeDtypeStruct((2, *data.example_shape(config.data)), dtype)
    return images, jax.ShapeDtypeStruct((2,), "int32")


def _train_step(config, built) -> tuple:
    """Returns (train step, argument shapes)."""
    image, label = _shapes(config, "uint8")
    return built.train_step, (built.abstract_state, {"image": image, "label": label})


def _sampler(config, built) -> tuple:
    """Returns (DDIM sampler with 50 steps, argument shapes)."""
    import jax

    from diffusion_jax import Denoiser, sampling, schedules
    from diffusion_jax.distributed import devices

    short = schedules.respace(built.schedule, 50)

    def generate(params, x_T, y):
        def network(x_t, time):
            return built.model.apply({"params": params}, x_t, time, y if built.model.num_classes else None)

        denoiser = Denoiser(network, variance=config.diffusion.variance)
        return sampling.sample(jax.random.key(0), short, denoiser, x_T, sampling.ddim())

    program = jax.jit(generate, compiler_options=devices.compiler_options())
    return program, (built.abstract_state.params, *_shapes(config, "float32"))


def _stages(program, arguments: tuple, compiled: bool) -> tuple[int, list[float]]:
    """Returns (number of equations, CPU seconds for tracing, lowering and, if `compiled`, compiling)."""
    from helpers.jaxprs import equations

    marks = [time.process_time()]
    traced = program.trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    if compiled:
        lowered.compile()
        marks.append(time.process_time())
    return sum(1 for _ in equations(traced.jaxpr.jaxpr)), [
        after - before for before, after in itertools.pairwise(marks)
    ]


def main() -> None:
    """Prints the selected parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="import,step,command,programs")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--presets", default=",".join(PIXELS))
    parser.add_argument("--data_dir", default="", help="directory of TFDS with CIFAR-10")
    parser.add_argument("--steps", type=int, default=1500, help="train steps of the part demo")
    parser.add_argument("--root", default=str(ROOT), help="clone whose code is measured in the last three parts")
    parser.add_argument("--compile", action="store_true", help="also compile the programs: minutes for large programs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "import" in parts:
        imports(options.pairs)
    if "step" in parts:
        first_step()
    if "command" in parts:
        command()
    if "refusals" in parts:
        refusals(options.root)
    if "demo" in parts:
        demo(options.root, options.steps)
    if "data" in parts:
        decoded_data(options.root, options.data_dir)
    if "programs" in parts:
        programs(options.presets.split(","), options.compile)


if __name__ == "__main__":
    main()
