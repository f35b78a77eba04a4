"""`--mode=train` and `train_classifier`: trains a config, or resumes from the newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, models, pretrained, training
from diffusion_jax.config import is_classifier, is_upsampler, resolve
from diffusion_jax.console import (
    ProgressBar,
    format_duration,
    log,
    log_compilation,
    log_parameters,
    progress_over,
)
from diffusion_jax.distributed import sharding
from diffusion_jax.distributed.processes import EXIT_PEER_LOST, barrier, broadcast_from_process_0
from diffusion_jax.distributed.signals import SignalHandler
from diffusion_jax.distributed.watchdog import Watchdog
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.run_dir import RunDir, committed_steps, open_run_dir
from diffusion_jax.runs import recipe_checks
from diffusion_jax.runs.logging import LaunchTimes, RunMetrics, check_writers
from diffusion_jax.runs.sampling import resolve_sampling
from diffusion_jax.runs.step_timing import StepsInFlight, TraceProfile
from diffusion_jax.runs.trained_model import load_initial_weights, normalization_differences, set_params
from diffusion_jax.runs.training_outputs import PreviewPictures, PreviewSampler, TrainingFid, TrainingOutputs
from diffusion_jax.runs.workdir import (
    check_data,
    check_identity,
    check_source,
    normalize,
    run_normalizations,
    write_config,
)
from diffusion_jax.training.checkpoints import Checkpoints, resume_hint

__all__ = ["BatchLoader", "run"]


def run(config: ConfigDict, workdir: RunDir | str | os.PathLike, source: data.Source | None = None) -> None:
    """Trains until `training.num_steps`; writes checkpoints, metrics and pictures to `workdir`.

    Args:
      source: the data, in place of those that `config.data` names; its other leaves describe them.
    Raises: UserError for a config that cannot be trained, a directory that holds another run, or a loss that is not finite;
    DataError, PretrainedError, CheckpointError, SaveError; signals.StoppedBySignal after a signal.
    """
    config, workdir = resolve(config), open_run_dir(workdir)
    launch = LaunchTimes(workdir)
    options = config.training
    intervals = {f"training.{leaf}": options[leaf] for leaf in ("log_every", "sample_every", "checkpoint_every")}
    for name, interval in (intervals | {"evaluation.every": config.evaluation.every}).items():
        if interval % options.steps_per_call:
            raise UserError(f"{name}={interval} must be a multiple of training.steps_per_call={options.steps_per_call}")
    check_writers(config)
    check_identity(config, workdir)
    with as_user_error("config"):
        program = training.build_program(config)
        net = pretrained.from_config(config, mesh=program.mesh)
        samples_from_noise = isinstance(net.model, models.Conditional) and not net.low_resolution
        if config.evaluation.every and not samples_from_noise:
            raise UserError(
                f"evaluation.every={config.evaluation.every} is for models that sample from noise alone; use "
                "evaluation.every=0"
            )
    saved = broadcast_from_process_0(lambda: committed_steps(workdir / "checkpoints"))
    if _is_finished(config, workdir, saved):
        return
    loaded = data.load(config.data, progress_over("Reading the data"), log, source)
    check_source(config, loaded)
    net = dataclasses.replace(net, class_names=tuple(data.read_classes(loaded)[1]))
    if isinstance(net.model, models.Conditional):
        with as_user_error("config"):  # the errors of --mode=sample, except those of the files that it reads
            resolve_sampling(config, net, read_files=False)
    recipe_checks.log_notes(config, loaded)
    initial_weights = None
    if config.init_from and not saved:
        initial_weights = load_initial_weights(config, program.model)
    broadcast_from_process_0(lambda: workdir.path.mkdir(parents=True, exist_ok=True))
    kept = (options.checkpoints_kept, options.checkpoint_keep_every)
    with (
        workdir.locked(f"is training in {workdir}"),
        Checkpoints(workdir.subdirectory("checkpoints"), *kept) as checkpoints,
    ):
        normalizations = run_normalizations(config, loaded, workdir)
        broadcast_from_process_0(lambda: check_data(loaded, workdir, normalizations))
        net = dataclasses.replace(net, normalizations=normalizations)
        preview = training_fid = None
        if config.sampling.preview_samples and samples_from_noise:
            sampler = PreviewSampler(config, net, loaded, config.sampling.preview_samples, config.sampling.seed)
            preview = PreviewPictures(workdir, sampler)
        if config.evaluation.every:
            sampler = PreviewSampler(config, net, loaded, config.sampling.batch_size, config.evaluation.seed)
            training_fid = TrainingFid(config, workdir, sampler, source)
        with launch.measure("restore"):
            state = _restore_or_initialize(config, program, checkpoints, initial_weights)
        if initial_weights is not None:
            difference = normalization_differences(initial_weights[0].normalizations, normalizations)
            if difference:
                log(f"Note: the data are scaled by their own constants, not those of the weights ({difference}).")
        del initial_weights  # as large as the network
        broadcast_from_process_0(lambda: write_config(config, workdir))
        log_parameters(state.params)
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
        _train(config, workdir, program, checkpoints, state, normalized, preview, training_fid, launch)
    advice = "Sample with --mode=sample."
    if is_upsampler(config):
        advice = "Enlarge images with --mode=sample --config.sampling.low_resolution=PATH."
    elif is_classifier(config):
        advice = f"Guide a model of the same schedule with --mode=sample --config.sampling.classifier={workdir}."
    log(f"Done: {options.num_steps} steps, in {workdir}. {advice}")


def _is_finished(config: ConfigDict, workdir: RunDir, saved: list[int]) -> bool:
    """Whether there is an intact checkpoint of the last step, which is logged. saved: the steps of the checkpoints."""
    num_steps = config.training.num_steps
    if max(saved, default=0) < num_steps:
        return False
    with Checkpoints(workdir.subdirectory("checkpoints"), read_only=True) as checkpoints:
        newest = checkpoints.newest_intact_step() or 0
    if newest < num_steps:
        return False
    log(f"This run is finished: {workdir} holds step {newest} of {num_steps}. Nothing to do.")
    return True


def _restore_or_initialize(
    config: ConfigDict,
    program: training.TrainingProgram,
    checkpoints: Checkpoints,
    initial_weights: tuple[Any, list[str]] | None,
) -> training.TrainState:
    """The state of the newest checkpoint, otherwise a new one.

    initial_weights: the result of `load_initial_weights`, None if the run starts from random ones.
    """
    state = checkpoints.restore(program.abstract_state)
    if state is not None:
        return state
    with log_compilation("the initialization"):
        state = program.init()
    if initial_weights is None:
        return state
    log(f"Starting from the weights of {config.init_from}.")
    net, differences = initial_weights
    if differences:
        log(f"Note: they were trained for another diffusion ({'; '.join(differences)}).")
    return set_params(state, program.abstract_state, net.params)


def _train(
    config: ConfigDict,
    workdir: RunDir,
    program: training.TrainingProgram,
    checkpoints: Checkpoints,
    state: training.TrainState,
    source: data.Source,
    preview: PreviewPictures | None,
    training_fid: TrainingFid | None,
    launch: LaunchTimes,
) -> None:
    """The train loop, from the step of `state` to the end. Raises: UserError, SaveError, StoppedBySignal."""
    options, is_writer, step = config.training, jax.process_index() == 0, int(state.step)
    empty_window = program.empty_window
    state = state if step % options.log_every else dataclasses.replace(state, window=empty_window())
    signals = SignalHandler(functools.partial(resume_hint, workdir), saves=True)
    watchdog = Watchdog(options.stall_timeout)
    profile = TraceProfile(workdir if is_writer and options.profile else None)
    launch.begin(step)
    with contextlib.ExitStack() as stack:
        if is_writer:
            stack.push(lambda kind, error, _: launch.stop(error) if kind else None)
        with launch.measure("start"):
            loader = BatchLoader(config, program, source, step)
            batch, count = loader.next(step)
        compiled = {}
        with log_compilation("the train step"), launch.measure("compile"):
            compiled[count] = _compile(program, count, state, batch)
            # Gloo ends processes that begin their first step more than 30 s apart, as slow compilations can be.
            barrier("compiled")
        metrics = stack.enter_context(RunMetrics(config, workdir, step)) if is_writer else None
        bar = stack.enter_context(ProgressBar("Training", options.num_steps, step))
        stack.enter_context(watchdog)
        stack.callback(loader.close)
        stack.callback(profile.stop)
        in_flight = StepsInFlight(step)
        outputs = TrainingOutputs(
            config, step, metrics, checkpoints, watchdog, preview, training_fid, launch, in_flight, signals
        )
        is_timed = handles_signals = False
        while step < options.num_steps:
            if count not in compiled:
                compiled[count] = _compile(program, count, state, batch)
            state, step_metrics = profile.call(step, compiled[count], state, batch)
            step += count
            in_flight.add(step, step_metrics["loss"])
            if step < options.num_steps:
                with launch.measure("input"):
                    batch, count = loader.next(step)
            in_flight.wait()
            if not handles_signals:  # before, there is nothing to save, and a signal ends the program at once
                stack.enter_context(signals)
                handles_signals = True
            watchdog.record_step()
            note = outputs.log_metrics(step, state)
            state = state if step % options.log_every else dataclasses.replace(state, window=empty_window())
            if not is_timed and (seconds := in_flight.seconds_per_step()):
                is_timed, num_left = True, options.num_steps - in_flight.finished
                duration = f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
                log(
                    f"A step takes {duration}; the {num_left:,} steps left take about "
                    f"{format_duration(num_left * seconds)} on this device."
                )
                if num_left * seconds > 7 * 86400:
                    batch_size = max(8, program.mesh.size * options.accumulation_steps)
                    log(
                        "Note: that is more than a week. To test this config, use another --workdir with "
                        f"--config.training.batch_size={batch_size} --config.training.num_steps=4."
                    )
            with launch.measure("output"):
                checkpoints.check()
                bar.update(in_flight.finished, note)
                if is_writer:
                    launch.record(in_flight.finished)
            if outputs.write(step, state, signals.requested()):
                break
        with watchdog.paused():
            with launch.measure("save"):
                checkpoints.finish(step)
            if is_writer:
                launch.record(step, is_last=True)
            is_incomplete = step < options.num_steps or signals.has_abandoned
            stopped = signals.stop_exception(step) if is_incomplete else None
        if stopped:
            raise stopped


def _compile(program: training.TrainingProgram, count: int, state: training.TrainState, batch) -> jax.stages.Compiled:
    """The train step of `count` steps."""
    function = program.train_step if count == 1 else program.train_steps
    assert function is not None
    return function.lower(state, batch).compile()


class BatchLoader:
    """Loads the batches from `step` on and places them on the devices.

    If the images are not in memory, other processes read ahead until `close`.
    """

    def __init__(self, config: ConfigDict, program: training.TrainingProgram, source: data.Source, step: int):
        self._options, self._mesh = config.training, program.mesh
        rows = sharding.process_rows(self._options.batch_size, program.mesh)
        batches = data.Batches(source, config.seed, self._options.batch_size, self._options.num_steps, rows)
        self._workers = 0 if data.is_in_memory(source) else config.data.workers
        self._stream = data.stream(batches, step, self._workers)
        self._can_scan = program.train_steps is not None
        if self._options.steps_per_call > 1 and not self._can_scan:
            steps = self._options.steps_per_call
            log(f"On the CPU, the {steps} steps of a call run one at a time, which is faster there.")

    def close(self) -> None:
        """Ends the processes that read ahead; otherwise their shared memory is reported as leaked."""
        if self._workers:
            self._stream.close()

    def next(self, step: int) -> tuple[Any, int]:
        """The next batch and the number of steps it is for.

        Several steps make one call if they end at a multiple of `steps_per_call`, so that a rerun with another
        `steps_per_call` skips no interval; the steps up to the first multiple, and those left at the end, are single.
        """
        count = self._options.steps_per_call
        if not self._can_scan or step % count or step + count > self._options.num_steps:
            return self._place(self._read(), 0), 1
        batches = [self._read() for _ in range(count)]
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), 1), count

    def _read(self):
        """One batch of this process. Raises: UserError if a process that decodes images was killed."""
        try:
            return next(self._stream)
        except RuntimeError as error:  # Grain's
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
