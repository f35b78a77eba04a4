"""`--mode=train` and `train_classifier`: trains a config, or resumes from the newest checkpoint.

`run` checks the config, reads the data and restores the state; `_train` is the loop. Each iteration calls the train step,
reads the next batch, and then writes the outputs that are due, in this order: metrics, a picture, the Frechet distance, a
checkpoint. Outputs come before the checkpoint, so a run that is killed in between writes the outputs again when it resumes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, models, pictures, pretrained, training
from diffusion_jax.config import check, is_classifier, is_upsampler, resolve
from diffusion_jax.console import (
    ProgressBar,
    log,
    log_compilation,
    log_parameters,
    progress_over,
)
from diffusion_jax.data.sources import read_conditions
from diffusion_jax.distributed import devices, sharding, signals
from diffusion_jax.distributed.processes import EXIT_PEER_LOST, Watchdog, barrier, broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.evaluation.features import CHUNK
from diffusion_jax.metrics import METRICS, Options, of_features, reported_name
from diffusion_jax.pretrained import load_initial_weights, set_params
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs.evaluate import load_pipeline, load_reference
from diffusion_jax.runs.examples import draw_beside_examples, write_examples
from diffusion_jax.runs.logging import LaunchTimes, RunMetrics, check_writers
from diffusion_jax.runs.plan import log_notes
from diffusion_jax.runs.sampling_setup import SamplingSetup, parse_classes, resolve_sampling
from diffusion_jax.runs.workdir import (
    check_data,
    check_identity,
    check_network_source,
    check_source,
    normalize,
    run_normalizations,
    to_dict,
    write_config,
)
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.optimizer import weights_kind
from diffusion_jax.training.state import initial_params

_FIRST_TRACED, _END_TRACED = 5, 10  # calls of the train step; the first calls fill caches


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Trains until `training.num_steps`; writes checkpoints, metrics and pictures to `workdir`.

    Args:
      source: training data that replace `data.dataset`; the other settings of `config.data` must describe these data.
    Raises: UserError for a config that cannot be trained, a directory that holds another run, or a loss that is not finite;
    DataError, PretrainedError, CheckpointError, SaveError; signals.StoppedBySignal after a signal.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    launch, options = LaunchTimes(workdir), config.training
    check(config, "training run")
    check_writers(config)
    check_identity(config, workdir)
    with as_user_error("config"):
        program = training.build_program(config)
        net = pretrained.from_config(config, mesh=program.mesh, network=program.model)
        if is_conditional := isinstance(net.model, models.Conditional):
            resolve_sampling(config, net, read_files=False)  # raises the errors of --mode=sample, except for files
    saved = broadcast_from_process_0(lambda: committed_steps(workdir / "checkpoints"))
    if max(saved, default=0) >= options.num_steps:
        with Checkpoints(workdir.subdirectory("checkpoints"), read_only=True) as checkpoints:
            newest = checkpoints.newest_intact_step() or 0
        if newest >= options.num_steps:
            log(f"This run is finished: {workdir} holds step {newest} of {options.num_steps}. Nothing to do.")
            return
    initial_weights = load_initial_weights(config, program.model) if config.init_from and not saved else None
    loaded = data.load(config.data, progress_over("Reading the data"), log, source)
    check_source(config, loaded, must_have_all_classes=not (saved or config.init_from))
    net = dataclasses.replace(net, class_names=tuple(data.read_classes(loaded)[1]))
    if is_conditional and (net.num_classes or not config.sampling.classifier):  # a label may be the name of a class
        parse_classes(config.sampling.label, net.num_classes, net.class_names)
    log_notes(config, loaded)
    broadcast_from_process_0(lambda: workdir.path.mkdir(parents=True, exist_ok=True))
    kept = (options.checkpoints_kept, options.checkpoint_keep_every)
    with (
        workdir.locked(f"is training in {workdir}"),
        Checkpoints(workdir.subdirectory("checkpoints"), *kept) as checkpoints,
    ):
        normalizations = run_normalizations(config, loaded, workdir)
        broadcast_from_process_0(lambda: check_data(loaded, workdir, normalizations))
        if is_conditional:
            broadcast_from_process_0(lambda: write_examples(loaded, workdir))
        net = dataclasses.replace(net, normalizations=normalizations)
        preview = frechet_distance = None
        if config.sampling.preview_samples and is_conditional and not net.low_resolution:
            count, seed = config.sampling.preview_samples, config.sampling.seed
            preview = SampleBatches(config, net, loaded, count, seed, "the pictures")
        if config.evaluation.every:
            count, seed = config.sampling.batch_size, config.evaluation.seed
            batches = SampleBatches(config, net, loaded, count, seed, "the Frechet distance")
            frechet_distance = _make_frechet_distance(config, workdir, batches, source)
        broadcast_from_process_0(lambda: check_network_source(net.model, workdir, records=True))
        with launch.measure("restore"):
            state = _restore_or_initialize(config, program, checkpoints, net, initial_weights)
        if initial_weights is not None and (origin := pretrained.origin(initial_weights)):
            broadcast_from_process_0(lambda: workdir.write_json(pretrained.ORIGIN_FILE, origin))
        del initial_weights  # as large as the network
        broadcast_from_process_0(lambda: write_config(config, workdir))
        log_parameters(lambda key: initial_params(key, program.model, net.example_shape))
        if jax.default_backend() == "gpu" and not options.deterministic:
            log(
                "Note: on GPUs, reruns and resumed runs agree up to rounding. For bit-identical numbers, at a lower speed, "
                "add --config.training.deterministic=True"
            )
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log(f"{len(loaded):,} examples, {num_parameters:,} parameters, batch {options.batch_size}.")
        step = int(state.step)
        log(f"Continuing from step {step}." if step else "Starting from step 0.")
        normalized = normalize(config, loaded, normalizations)
        _train(config, workdir, program, checkpoints, state, normalized, preview, frechet_distance, launch)
    advice = "Sample with --mode=sample."
    if is_upsampler(config):
        advice = "Enlarge images with --mode=sample --config.sampling.low_resolution=PATH."
    elif is_classifier(config):
        advice = f"Guide a model of the same schedule with --mode=sample --config.sampling.classifier={workdir}."
    log(f"Done: {options.num_steps} steps, in {workdir}. {advice}")


def _restore_or_initialize(
    config: ConfigDict,
    program: training.TrainingProgram,
    checkpoints: Checkpoints,
    net: pretrained.Model,
    initial_weights: pretrained.Model | None,
) -> training.TrainState:
    """Restores the newest checkpoint, or initializes a new state, at random or with `initial_weights`."""
    state = checkpoints.restore(program.abstract_state)
    if state is not None:
        return state
    with log_compilation("the initialization"):
        state = program.init()
    if initial_weights is None:
        return state
    log(f"Starting from the weights of {config.init_from}.")
    if differences := net.find_differences(initial_weights):
        log(f"Note: these weights were trained for other data or another diffusion ({'; '.join(differences)}).")
    return set_params(state, program.abstract_state, initial_weights.params)


def _train(
    config: ConfigDict,
    workdir: RunDir,
    program: training.TrainingProgram,
    checkpoints: Checkpoints,
    state: training.TrainState,
    source: data.Source,
    preview: SampleBatches | None,
    frechet_distance: Callable[[Any], dict[str, float]] | None,
    launch: LaunchTimes,
) -> None:
    """Runs the train loop from the step of `state` to the end.

    source: normalized. frechet_distance: a function of parameters.
    Raises: UserError if a loss or gradient is not finite, SaveError, StoppedBySignal.
    """
    options, step, num_calls = config.training, int(state.step), 0
    is_traced = options.profile and jax.process_index() == 0

    def is_due(every: int) -> bool:
        return every > 0 and (step == options.num_steps or step % every == 0)

    state = _empty_averages_if_due(config, program, state, step)
    launch.begin(step, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, error, _: launch.stop(error) if kind else None)
        with launch.measure("start"):
            loader = BatchLoader(config, program, source, step)
            batch, count = loader.next(step)
        with log_compilation("the train step"), launch.measure("compile"):
            compiled = {count: _compile(program, count, state, batch)}
            # Gloo ends processes that start their first step more than 30 s apart, which slow compilations can cause.
            barrier("compiled")
        metrics = stack.enter_context(RunMetrics(config, workdir, step))
        bar = stack.enter_context(ProgressBar("Training", options.num_steps, step))
        watchdog = stack.enter_context(Watchdog(options.stall_timeout))
        stack.callback(loader.close)
        tracing = stack.enter_context(contextlib.ExitStack())
        in_flight, note, logged_step = StepsInFlight(step), "", step
        must_stop = False
        launch.lap()
        while step < options.num_steps and not must_stop:
            if count not in compiled:
                compiled[count] = _compile(program, count, state, batch)
            if is_traced and num_calls == _FIRST_TRACED:
                tracing.enter_context(_trace(workdir, in_flight))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, step_metrics = compiled[count](state, batch)
            step, num_calls = step + count, num_calls + 1
            in_flight.add(step, step_metrics["loss"])
            if num_calls == _END_TRACED:
                tracing.close()
            with launch.measure("input"):
                batch, count = loader.next(step)
            in_flight.wait()
            workdir.check_locks(local=True)
            if num_calls == 1:  # before the first call, there is nothing to save, and a signal ends the program at once
                stack.enter_context(signals.HANDLER.saving())

            if is_due(options.log_every):
                in_flight.drain()
                means = training.mean_metrics(_check_finite(state, checkpoints))
                speed = _speed(launch.lap(), step - logged_step, options.num_steps - step, options.batch_size)
                logged_step = step
                note = f"loss {means['loss']:.4f}  {speed['images_per_second']:,.5g} {data.noun(config.data)}/s"
                note += f"  {peak / 1e9:.1f} GB" if (peak := devices.peak_memory()) else ""
                with launch.measure("output"):
                    metrics.write_scalars(step, means | speed | {"goodput": launch.goodput()})
            watchdog.record_step()
            state = _empty_averages_if_due(config, program, state, step)
            with launch.measure("output"):
                checkpoints.check()
                bar.update(in_flight.finished, note)
                launch.record(in_flight.finished)

            must_stop = signals.HANDLER.requested()
            if preview and is_due(options.sample_every) and not must_stop:
                in_flight.drain()
                with launch.measure("output"), watchdog.paused():
                    kind, params = _sampling_weights(config, state, step)
                    _write_picture(workdir, metrics, step, preview(params), preview.setup, kind)
            if frechet_distance and is_due(config.evaluation.every) and not must_stop:
                in_flight.drain()
                with launch.measure("output"), watchdog.paused():
                    kind, params = _sampling_weights(config, state, step)
                    distance = frechet_distance(params)
                    text = "".join(f"{name} {value:.4g}" for name, value in distance.items())
                    log(f"{text} at step {step}{' (raw weights)' * (kind == 'raw')}")
                    metrics.write_scalars(step, distance)
            if must_stop or is_due(options.checkpoint_every):
                in_flight.drain()
                with launch.measure("output"):
                    _check_finite(state, checkpoints)
                    metrics.flush()  # a run that resumes from this checkpoint does not write the earlier lines again
                    with watchdog.paused(), launch.measure("save"):
                        checkpoints.save(step, state)

        with watchdog.paused():
            with launch.measure("save"):
                checkpoints.finish()
            launch.record(step, is_last=True)
            if step < options.num_steps:
                raise signals.HANDLER.stop_exception(step)


def _compile(program: training.TrainingProgram, count: int, state: training.TrainState, batch) -> jax.stages.Compiled:
    """Compiles the call that runs `count` train steps."""
    function = program.train_step if count == 1 else program.train_steps
    assert function is not None
    return function.lower(state, batch).compile()


@contextlib.contextmanager
def _trace(workdir: RunDir, in_flight: StepsInFlight) -> Iterator[None]:
    """Traces the block for XProf, and writes the trace to the work directory."""
    jax.profiler.start_trace(str(workdir.path))
    try:
        yield
        in_flight.drain()
    finally:
        jax.profiler.stop_trace()
        workdir.upload(workdir / "plugins")
        log(f"A trace of the train step: xprof --logdir={workdir} (pip install xprof).")


def _empty_averages_if_due(
    config: ConfigDict, program: training.TrainingProgram, state: training.TrainState, step: int
) -> training.TrainState:
    """Empties the averages of metrics if `training.log_every` divides the step; otherwise returns the state unchanged."""
    if step % config.training.log_every:
        return state
    return dataclasses.replace(state, averages=program.empty_averages())


def _sampling_weights(config: ConfigDict, state: training.TrainState, step: int) -> tuple[str, Any]:
    """Returns ("ema", the EMA), or ("raw", the parameters) while the EMA holds too much of the initial parameters."""
    kind = weights_kind(config, step)
    return kind, state.ema_params if kind == "ema" else state.params


def _check_finite(state: training.TrainState, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the averages of metrics on the host. Raises: UserError if a loss, gradient or parameter was not finite."""
    averages = jax.device_get(state.averages)
    if averages["nonfinite_step"] >= 0:
        steps = checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there was no checkpoint yet"
        raise UserError(
            f"the loss, its gradient or the parameters were not finite at step {averages['nonfinite_step']} ({kept}); "
            "try, in a new --workdir, a lower optimizer.learning_rate, a longer optimizer.warmup_steps, "
            "optimizer.grad_clip=1.0, or model.dtype=float32",
            exit_code=1,
        )
    return averages


def _speed(spent: dict[str, float], num_steps: int, num_left: int, batch_size: int) -> dict[str, float]:
    """Returns the speed of `num_steps` steps, and how the time was spent. spent: the result of `LaunchTimes.lap`."""
    seconds, logging = sum(spent.values()), spent["output"] + spent["save"]
    return {
        "images_per_second": num_steps * batch_size / (seconds - logging),  # the speed of training alone
        "seconds_left": num_left * seconds / num_steps,
        "step_seconds": seconds / num_steps,
        "compute": spent["train"] / seconds,
        "data_wait": spent["input"] / seconds,
        "logging": logging / seconds,
    }


class BatchLoader:
    """Loads the batches from `step` on and places them on the devices.

    If the images are not in memory, other processes read ahead until `close`.
    """

    def __init__(self, config: ConfigDict, program: training.TrainingProgram, source: data.Source, step: int):
        self._options, self._mesh = config.training, program.mesh
        rows = sharding.process_rows(self._options.batch_size, program.mesh)
        batches = data.Batches(source, config.seed, self._options.batch_size, self._options.num_steps, rows)
        if (count := batches.num_blocks) > 1:
            log(f"The {count:,} blocks of the data are shuffled, and the examples of about two blocks at a time.")
        self._workers = 0 if data.is_in_memory(source) else config.data.workers
        self._stream = data.stream(batches, step, self._workers)
        self._can_scan = program.train_steps is not None
        if self._options.steps_per_call > 1 and not self._can_scan:
            steps = self._options.steps_per_call
            log(f"On the CPU, the {steps} steps of a call run one at a time, which is faster there.")

    def close(self) -> None:
        """Ends the processes that read ahead; otherwise Python reports their shared memory as leaked."""
        if self._workers:
            self._stream.close()

    def next(self, step: int) -> tuple[Any, int]:
        """Returns (batch, number of steps) for the call that starts at `step`; (None, 0) after the last step.

        A call runs `steps_per_call` steps if it starts at a multiple of that number, also after a rerun; otherwise one step.
        """
        count = self._options.steps_per_call
        if step == self._options.num_steps:
            return None, 0
        if not self._can_scan or step % count or step + count > self._options.num_steps:
            return self._place(self._read(), 0), 1
        batches = [self._read() for _ in range(count)]
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), 1), count

    def _read(self):
        """Reads one batch of this process. Raises: UserError if a process that decodes images was killed."""
        try:
            return next(self._stream)
        except RuntimeError as error:  # from Grain
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                "a process that reads the data was killed, possibly for lack of memory: reduce data.workers and rerun the "
                "same command to resume from the last checkpoint",
                EXIT_PEER_LOST,
            ) from error

    def _place(self, batch, leading_axes: int):
        by_rows = sharding.batch_sharding(self._mesh, leading_axes)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(by_rows, leaf), batch)


class StepsInFlight:
    """Calls of the train step that were dispatched and may not have finished, limited to about a second of work.

    JAX returns from a call before the devices finish it, and queues tens of calls, also on CPUs. Without a limit, a stopped
    run would finish all queued calls before it saves, and the progress bar would count queued steps.

    finished: the step after the last call that has finished.
    """

    _SECONDS = 1.0  # long enough to hide pauses of the host, short enough to stop the run soon
    _MAX_CALLS = 32  # JAX's own limit on CPUs

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter):
        self.finished = step
        self._calls: collections.deque[tuple[int, jax.Array]] = collections.deque()
        self._clock, self._last_time, self._limit = clock, 0.0, 0.0  # the limit is a number of steps

    def add(self, step: int, output: jax.Array) -> None:
        """Adds a call. step: the step after the call. output: a result of the call that no later call donates."""
        if not self._calls:
            self._last_time = self._clock()  # the devices were idle
        self._calls.append((step, output))

    def wait(self) -> None:
        """Waits until the steps in flight are at most about a second of work."""
        self._wait(self._limit)

    def drain(self) -> None:
        """Waits until all calls have finished."""
        self._wait(0)

    def _wait(self, limit: float) -> None:
        before, num_calls = self.finished, 0
        while self._calls and (
            self._calls[-1][0] - self.finished > limit
            or len(self._calls) > self._MAX_CALLS
            or self._calls[0][1].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        ):
            self.finished, output = self._calls.popleft()
            jax.block_until_ready(output)
            num_calls += 1
        if not num_calls:
            return
        now, steps = self._clock(), self.finished - before
        seconds, self._last_time = now - self._last_time, now
        # The limit grows by at most one call, because calls that finish during a pause of the host look short.
        self._limit = min(self._SECONDS * steps / max(seconds, 1e-6), self._limit + steps / num_calls)


# ---- Samples


class SampleBatches:
    """Batches of samples, drawn with a few DDIM steps: `batches(params, i)`. Only the first call compiles."""

    def __init__(
        self, config: ConfigDict, net: pretrained.Model, source: data.Source, num_images: int, seed: int, purpose: str
    ):
        """net: without parameters. source: in data units; samples get the conditions of evenly spread examples.

        num_images: the batch size, rounded down to a multiple of the device count, but at least one image for each device.
        purpose: a noun phrase for the log, such as "the pictures". Raises: UserError or ValueError for settings that are not
        allowed.
        """
        options, num_devices = to_dict(config), net.num_devices
        options["sampling"] |= {
            "sampler": "ddim",
            "steps": min(config.sampling.preview_steps, net.schedule.num_timesteps),
            "spacing": None,
            "eta": 0.0,
            "guidance_scale": 1.0,
            "classifier": "",
            "label": None,
        }
        self._seed, self._purpose, self._is_compiled = seed, purpose, False
        self.batch_size, conditions = max(1, num_images // num_devices) * num_devices, None
        if net.condition_shape is not None:
            rows = np.linspace(0, len(source) - 1, self.batch_size).round().astype(int)
            conditions = read_conditions(source.read(rows))
        self.setup = resolve_sampling(ConfigDict(options), net, conditions, read_files=False)

    def __call__(self, params: Any, batch: int = 0) -> np.ndarray:
        """Draws samples [N, *spatial, C], with the same random numbers at every call; every process must call this."""
        if not self._is_compiled:
            log(f"Compiling the sampler of {self._purpose} ...")
            self._is_compiled = True
        setup = dataclasses.replace(self.setup, net=self.setup.net.with_params(params))
        return setup.generate_batch(self._seed, batch, self.batch_size)


def _write_picture(
    workdir: RunDir, metrics: RunMetrics, step: int, samples: np.ndarray, setup: SamplingSetup, kind: str
) -> None:
    """Writes a picture of samples, on process 0 only: as a PNG to `workdir`, and as an image to the writers of metrics.

    If the PNG cannot be written, a note is logged and the run continues. kind: the kind of weights, "ema" or "raw".
    """
    if jax.process_index() != 0:
        return
    title = f"Samples after {step:,} training steps, by DDIM with {setup.schedule.num_timesteps} steps"
    title += ", raw weights" if kind == "raw" else ""
    picture = pictures.to_array(draw_beside_examples(workdir, setup, samples, title))
    try:
        path = workdir / "samples" / f"train_step{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        pictures.save(path, picture)
        workdir.upload(path)
    except OSError as error:
        log(f"Note: the picture of step {step} could not be written: {error}.")
    metrics.write_image(step, "samples", picture, title)


def _make_frechet_distance(
    config: ConfigDict, workdir: RunDir, batches: SampleBatches, source: data.Source | None
) -> Callable[[Any], dict[str, float]]:
    """Returns a function from parameters to the Frechet distance of `evaluation.every_samples` samples.

    Every call draws the same noise. The metric's name contains the numbers of samples and steps, because the distance
    depends on both. The features of the reference are computed now. source: training data that replace `config.data`.
    Raises: UserError, DataError, PretrainedError.
    """
    options = config.evaluation
    pipeline = load_pipeline(config, workdir)
    reference = load_reference(config, None if options.reference_split else source)
    with as_user_error(f"evaluation.every={options.every}"):
        moments = pipeline.extract_set(reference).moments
    num_samples, extractor = options.every_samples, pipeline.extractor
    metric = reported_name("fid", extractor.published, extractor.resize)
    name = f"{metric}_{num_samples}_ddim{batches.setup.schedule.num_timesteps}"

    def frechet_distance(params: Any) -> dict[str, float]:
        num_batches = -(-num_samples // batches.batch_size)
        samples = np.concatenate([batches(params, i) for i in range(num_batches)])[:num_samples]
        chunks = (pipeline(samples[i : i + CHUNK])["pool"] for i in range(0, num_samples, CHUNK))
        return {name: METRICS["fid"].compute(moments, of_features.moments_of_chunks(chunks), Options()).values[""]}

    return frechet_distance
