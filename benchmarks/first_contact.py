"""Checks this machine's GPUs or TPUs in at most ten minutes, one line for each check: `make accelerator EXTRA=cuda` (or tpu).

    python benchmarks/first_contact.py
    python benchmarks/first_contact.py --directory=DIR    # several hosts: start on each host; all hosts must see DIR

CPU devices are checked, too, with a smaller network. Several processes find each other as in main.py, or with the same flags.
Exit code: 0, or 1 if a check failed or did not finish.

| check | passes if |
|---|---|
| outputs | network outputs equal the CPU's to 1e-4 of the largest value, at the precision "highest" |
| bfloat16 | bfloat16 outputs equal the CPU's to 0.1; losses and gradient norms of four steps equal float32's to 0.1 |
| resume | four steps equal, to the bit, two steps, a checkpoint, and two more steps in a program that is compiled again |
| fsdp | losses and gradient norms with parameters split over all devices equal replicated training to 1e-4 |
| steps_per_call | losses and gradient norms of two steps in one program equal single steps to 1e-4 |
| step | a train step of configs/cifar10.py is finite; the line shows its time, on TPUs beside the compiler's estimate |
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.config import default
from diffusion_jax.distributed import hlo, sharding
from diffusion_jax.distributed.devices import silence_libraries
from diffusion_jax.distributed.processes import (
    broadcast_from_process_0,
    exit_now,
    gather,
    is_multiprocess,
    join_processes,
    log,
)
from diffusion_jax.pretrained import set_params
from diffusion_jax.training.checkpoints import Checkpoints

MAX_SECONDS = 600
STEPS, TRAINED = 4, "losses and gradient norms"
AGREEMENT = 1e-4  # float32 rounding errors of about thirty layers, and another order of sums
BFLOAT16_AGREEMENT = 0.1  # a rounding error is 2^-9, and the errors of all layers add up


class CheckFailed(Exception):
    """The result of a check is wrong."""


class Skipped(Exception):
    """A check does not apply to this machine; the message is the reason."""


def make_config(batch_size: int = 8, **settings: Any) -> ConfigDict:
    """Returns a config for a small DDPM network with deterministic float32 kernels. batch_size: minimum for each step."""
    config = default()
    config.model.update(channels=64, channel_multipliers=(1, 2), num_res_blocks=1, precision="highest")
    if jax.default_backend() == "cpu":
        config.model.update(channels=8, channel_multipliers=(1,), attention_levels=(0,), num_groups=4)
        config.data.image_size = 8
    config.training.update(batch_size=-(-batch_size // jax.device_count()) * jax.device_count(), deterministic=True)
    config.optimizer.warmup_steps = 0
    config.update_from_flattened_dict(settings)
    return config


def make_batches(
    config: ConfigDict, program: training.TrainingProgram, steps: int, steps_per_call: int = 1
) -> Iterator[dict[str, jax.Array]]:
    """Yields random images [B, ...], or [steps_per_call, B, ...], the same for each mesh."""
    rows = sharding.process_rows(config.training.batch_size, program.mesh)
    shape, stacks = (config.training.batch_size, *data.example_shape(config.data)), steps_per_call > 1
    place = sharding.batch_sharding(program.mesh, 1 if stacks else 0)
    for first in range(0, steps, steps_per_call):
        steps_of_call = range(first, first + steps_per_call)
        images = [np.random.default_rng(step).integers(0, 256, shape, np.uint8)[rows] for step in steps_of_call]
        yield {"image": jax.make_array_from_process_local_data(place, np.stack(images) if stacks else images[0])}


def draw_params(program: training.TrainingProgram) -> Any:
    """Draws random parameters. Some initial parameters are 0, so outputs and gradients would hardly depend on the rest."""
    draw = np.random.default_rng(0)

    def parameter(leaf):
        noise = draw.normal(size=leaf.shape).astype(np.float32)
        return noise / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1 * noise

    return jax.tree.map(parameter, program.abstract_state.params)


def initial_state(program: training.TrainingProgram) -> training.TrainState:
    """Returns the state before the first step, with random parameters."""
    return set_params(program.init(), program.abstract_state, draw_params(program))


def measures(metrics: Mapping[str, jax.Array]) -> list[float]:
    """Returns the loss and the gradient norm."""
    return [float(metrics[name]) for name in ("loss", "grad_norm")]


def train(config: ConfigDict, directory: pathlib.Path | None = None) -> tuple[np.ndarray, training.TrainState]:
    """Trains for STEPS steps. Returns: (losses and gradient norms [STEPS, 2], state).

    directory: if given, a checkpoint is saved here halfway, and a program that is compiled again resumes from it.
    """
    program = training.build_program(config)
    state, rows = initial_state(program), []
    for step, batch in enumerate(make_batches(config, program, STEPS)):
        if directory is not None and step == STEPS // 2:
            with Checkpoints(directory) as checkpoints:
                checkpoints.save(step, state)
                checkpoints.finish()
                jax.clear_caches()
                program = training.build_program(config)
                restored = checkpoints.restore(program.abstract_state)
            assert restored is not None
            state = restored
        state, metrics = program.train_step(state, batch)
        rows.append(measures(metrics))
    return np.array(rows), state


def check_close(what: str, found, expected, tolerance: float) -> str:
    """Formats the largest difference of two arrays [N, ...], relative to each column's maximum. Raises: CheckFailed."""
    found, expected = np.asarray(found), np.asarray(expected)
    error = float((np.abs(found - expected) / np.abs(expected).max(axis=0)).max())
    if not error <= tolerance:
        raise CheckFailed(f"the {what} differ by {error:.1e} of the largest value, more than {tolerance:.0e}")
    return f"{what} to {error:.1e}"


class Checks:
    """The checks, in order; each check returns its line. directory: for checkpoints; all processes must see it."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    @functools.cached_property
    def _trained(self) -> tuple[np.ndarray, training.TrainState]:
        return train(make_config())

    def _outputs(self, device: jax.Device, **fields: Any) -> np.ndarray:
        """Returns network outputs [N] for random images and parameters."""
        config = make_config()
        program = training.build_program(config)
        model = program.model.clone(**fields)
        x_t, time = np.random.default_rng(1).normal(size=(4, *data.example_shape(config.data))), [0, 10, 500, 999]
        arguments = jax.device_put((draw_params(program), np.float32(x_t), np.float32(time)), device)
        apply = jax.jit(lambda params, x_t, time: model.apply({"params": params}, x_t, time))
        return np.asarray(apply(*arguments)).ravel()

    @functools.cached_property
    def _outputs_of_the_cpu(self) -> np.ndarray:
        return self._outputs(jax.local_devices(backend="cpu")[-1])

    def outputs(self) -> str:
        line = check_close("outputs", self._outputs(jax.local_devices()[0]), self._outputs_of_the_cpu, AGREEMENT)
        by_default = self._outputs(jax.local_devices()[0], precision="default")
        return f"{line}; {check_close('at the default precision', by_default, self._outputs_of_the_cpu, 0.1)}"

    def bfloat16(self) -> str:
        outputs = self._outputs(jax.local_devices()[0], dtype="bfloat16")
        line = check_close("outputs", outputs, self._outputs_of_the_cpu, BFLOAT16_AGREEMENT)
        rows, _ = train(make_config(**{"model.dtype": "bfloat16"}))
        return f"{line}; {check_close(TRAINED, rows, self._trained[0], BFLOAT16_AGREEMENT)}"

    def resume(self) -> str:
        rows, state = train(make_config(), self._directory / "checkpoints")
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(self._trained[1]), strict=True)
        equal = all(
            np.array_equal(one.data, two.data)
            for first, second in pairs
            for one, two in zip(first.addressable_shards, second.addressable_shards, strict=True)
        )
        if not equal or not np.array_equal(rows, self._trained[0]):
            raise CheckFailed("the resumed run is not bit-identical")
        return "bit-identical after a checkpoint"

    def fsdp(self) -> str:
        if jax.device_count() == 1:
            raise Skipped("one device")
        rows, _ = train(make_config(**{"mesh.data": 1, "mesh.fsdp": jax.device_count()}))
        return check_close(TRAINED, rows, self._trained[0], AGREEMENT)

    def steps_per_call(self) -> str:
        config = make_config(**{"training.steps_per_call": 2})
        program = training.build_program(config)
        if program.train_steps is None:
            raise Skipped("on CPUs each step is a call")
        state, rows = initial_state(program), []
        for batches in make_batches(config, program, STEPS, 2):
            state, metrics = program.train_steps(state, batches)
            rows.append(measures(metrics))
        return check_close(TRAINED, rows, self._trained[0][1::2], AGREEMENT)

    def step(self) -> str:
        config = default() if jax.default_backend() != "cpu" else make_config()
        config.training.batch_size = make_config(config.training.batch_size).training.batch_size
        program = training.build_program(config)
        (batch,) = make_batches(config, program, 1)
        start = time.perf_counter()
        initial = program.init()
        train_step = program.train_step.lower(initial, batch).compile()
        state, metrics = train_step(initial, batch)
        first_loss = float(metrics["loss"])
        first, calls = time.perf_counter() - start, 20
        start = time.perf_counter()
        for _ in range(calls):
            state, metrics = train_step(state, batch)
        if not np.isfinite([first_loss, float(metrics["loss"])]).all():
            raise CheckFailed(f"the losses are {first_loss} and {float(metrics['loss'])}")
        seconds = (time.perf_counter() - start) / calls
        size, count = config.training.batch_size, sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return (
            f"{1e3 * seconds:.1f} ms, {size / seconds:,.0f} images/s ({count:,} parameters, batch {size}, "
            f"{config.model.dtype}; the first step took {first:.0f} s){beside_estimate(train_step.as_text(), seconds)}"
        )


def beside_estimate(text: str, seconds: float) -> str:
    """Returns the TPU compiler's estimate of a program that took `seconds`, and the clock that would make both equal."""
    cycles = hlo.Program(text).cycles
    if not cycles:  # other compilers have no estimates
        return ""
    return f"; the compiler estimates {cycles:,} cycles, which take this time at {cycles / seconds / 1e9:.3g} GHz"


CHECKS = ("outputs", "bfloat16", "resume", "fsdp", "steps_per_call", "step")


def run_checks(checks: Any, names: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Yields (passed, line) for each named check. With several processes, an error in one process ends all processes."""
    for name in names:
        passed, start = True, time.perf_counter()
        try:
            text = getattr(checks, name)()
            word = "ok"
        except Skipped as reason:
            word, text = "skipped", str(reason)
        except CheckFailed as error:
            passed, word, text = False, "FAILED", str(error)
        except Exception as error:
            if is_multiprocess():
                raise
            lines = str(error).strip().splitlines() or [""]
            passed, word, text = False, "FAILED", f"{type(error).__name__}: {lines[0]}"
        if not all(gather(bool(passed))):
            passed, word = False, "FAILED"
        yield passed, f"{word:8}{name:16}{text} ({time.perf_counter() - start:.0f} s)"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", default=",".join(CHECKS), help="the default is all checks")
    parser.add_argument("--directory", help="where a temporary directory for a checkpoint is made")
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="this and the next two as of main.py")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    options = parser.parse_args(arguments)
    options.checks = options.checks.split(",")
    unknown = set(options.checks) - set(CHECKS)
    if unknown:
        parser.error(f"--checks: unknown {', '.join(sorted(unknown))}; known: {', '.join(CHECKS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each check and returns the exit code."""
    options = parse(arguments)
    silence_libraries()
    join_processes(options.coordinator_address, options.num_processes, options.process_id, 300)
    message = f"the checks did not finish in {MAX_SECONDS / 60:.0f} minutes; --checks selects checks"
    timer = threading.Timer(MAX_SECONDS, exit_now, (message, 1))
    timer.daemon = True
    timer.start()
    if options.directory:
        pathlib.Path(options.directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        parent = broadcast_from_process_0(lambda: str(pathlib.Path(temporary).absolute()))
        devices, processes = jax.device_count(), jax.process_count()
        log(f"jax {jax.__version__} on {devices} x {jax.devices()[0].device_kind}, {processes} process(es)")
        results = []
        for passed, line in run_checks(Checks(pathlib.Path(parent)), options.checks):
            log(line)
            results.append(passed)
        timer.cancel()
        gather(True)  # process 0 removes its directory only when no other process reads it
    log("all checks passed" if all(results) else "at least one check failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
