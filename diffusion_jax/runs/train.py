"""`--mode=train` and `train_classifier`: trains a config, or resumes from the newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.config import is_classifier, is_upsampler, resolve
from diffusion_jax.distributed.preemption import Preemption
from diffusion_jax.distributed.processes import barrier, broadcast_from_process_0
from diffusion_jax.distributed.watchdog import Watchdog
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.runs import recipe_checks
from diffusion_jax.runs.batch_loader import BatchLoader
from diffusion_jax.runs.batch_sampler import BatchSampler
from diffusion_jax.runs.console import (
    ProgressBar,
    format_duration,
    format_seconds,
    log,
    log_compilation,
    log_parameters,
    progress_over,
)
from diffusion_jax.runs.data_source import check_source, normalize, run_normalizations
from diffusion_jax.runs.devices import log_determinism
from diffusion_jax.runs.goodput import LaunchTimes
from diffusion_jax.runs.metrics_files import RunMetrics, check_writers
from diffusion_jax.runs.preview import PreviewPictures, TrainingFid, check_sampling, make_preview_sampler, set_data
from diffusion_jax.runs.step_timing import StepsInFlight, TraceProfile
from diffusion_jax.runs.trained_model import (
    InitialWeights,
    load_initial_weights,
    normalization_differences,
    set_params,
)
from diffusion_jax.runs.training_outputs import TrainingOutputs
from diffusion_jax.runs.workdir import check_data, check_identity, write_config
from diffusion_jax.storage.locks import locked
from diffusion_jax.training.checkpoints import Checkpoints, committed_steps, resume_hint

__all__ = ["run"]


def run(config: ConfigDict, workdir: pathlib.Path, source: data.Source | None = None) -> None:
    """Trains until `training.num_steps`; writes checkpoints, metrics and pictures to `workdir`.

    Args:
      source: the data, in place of those that `config.data` names; its other leaves describe them.
    Raises: UserError for a config that cannot be trained, a directory that holds another run, or a loss that is not finite;
    DataError, PretrainedError, CheckpointError, SaveError; preemption.StoppedBySignal after a signal.
    """
    config, launch = resolve(config), LaunchTimes(workdir)
    _check_intervals(config)
    check_writers(config)
    check_identity(config, workdir)
    with as_user_error("config"):
        program = training.build_program(config)
        preview_sampler = make_preview_sampler(config, program, config.sampling.preview_samples)
        fid_sampler = _make_fid_sampler(config, program)
    if _is_finished(config, workdir):
        return
    loaded = data.load(config.data, progress_over("Reading the data"), log, source)
    check_source(config, loaded)
    _, class_names = data.read_classes(loaded)
    with as_user_error("config"):
        check_sampling(config, program, class_names)
    recipe_checks.log_notes(config, loaded)
    initial_weights = None
    if config.init_from and not _checkpoint_steps(workdir):
        initial_weights = load_initial_weights(config, program.model)
    broadcast_from_process_0(lambda: workdir.mkdir(parents=True, exist_ok=True))
    training_fid = TrainingFid(config, workdir, fid_sampler, source) if fid_sampler else None
    preview = None
    if preview_sampler:
        preview = PreviewPictures(workdir, preview_sampler, config.sampling.seed, class_names)
    kept = (config.training.checkpoints_kept, config.training.checkpoint_keep_every)
    with (
        locked(workdir / ".lock", f"is training in {workdir}"),
        Checkpoints(workdir / "checkpoints", *kept) as checkpoints,
    ):
        normalizations = run_normalizations(config, loaded, workdir)
        broadcast_from_process_0(lambda: check_data(loaded, workdir, normalizations))
        with launch.measure("restore"):
            state = _restore_or_initialize(config, program, checkpoints, initial_weights)
        if initial_weights is not None:
            difference = normalization_differences(initial_weights, normalizations)
            if difference:
                log(f"Note: the data are scaled by their own constants, not those of the weights ({difference}).")
        del initial_weights  # as large as the network
        broadcast_from_process_0(lambda: write_config(config, workdir))
        log_parameters(state.params)
        log_determinism(config.training.deterministic)
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log(f"{len(loaded):,} examples, {num_parameters:,} parameters, batch {config.training.batch_size}.")
        step = int(state.step)
        log(f"Continuing from step {step}." if step else "Starting from step 0.")
        normalized = normalize(config, loaded, normalizations)
        for batch_sampler in filter(None, (preview_sampler, fid_sampler)):
            set_data(batch_sampler, normalized, normalizations)
        _train(config, workdir, program, checkpoints, state, normalized, preview, training_fid, launch)
    log(f"Done: {config.training.num_steps} steps, in {workdir}. {_next_command(config, workdir)}")


def _make_fid_sampler(config: ConfigDict, program: training.TrainingProgram) -> BatchSampler | None:
    """The sampler of the Frechet distance during training; None without `evaluation.every`. Raises: UserError."""
    if not config.evaluation.every:
        return None
    sampler = make_preview_sampler(config, program, config.sampling.batch_size)
    if not sampler:
        raise UserError(
            f"evaluation.every={config.evaluation.every} is for models that sample from noise alone; use evaluation.every=0"
        )
    return sampler


def _check_intervals(config: ConfigDict) -> None:
    """Raises: UserError for intervals that end inside a call of several steps."""
    options = config.training
    intervals = {f"training.{leaf}": options[leaf] for leaf in ("log_every", "sample_every", "checkpoint_every")}
    for name, interval in (intervals | {"evaluation.every": config.evaluation.every}).items():
        if interval % options.steps_per_call:
            raise UserError(f"{name}={interval} must be a multiple of training.steps_per_call={options.steps_per_call}")


def _checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    return broadcast_from_process_0(lambda: committed_steps(workdir / "checkpoints"))


def _is_finished(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether there is an intact checkpoint of the last step, which is logged."""
    num_steps = config.training.num_steps
    if max(_checkpoint_steps(workdir), default=0) < num_steps:
        return False
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.newest_intact_step() or 0
    if newest < num_steps:
        return False
    log(f"This run is finished: {workdir} holds step {newest} of {num_steps}. Nothing to do.")
    return True


def _restore_or_initialize(
    config: ConfigDict,
    program: training.TrainingProgram,
    checkpoints: Checkpoints,
    initial_weights: InitialWeights | None,
) -> training.TrainState:
    """The state of the newest checkpoint, otherwise a new one, with `initial_weights` if there are any."""
    state = checkpoints.restore(program.abstract_state)
    if state is not None:
        return state
    with log_compilation("the initialization"):
        state = program.init()
    if initial_weights is None:
        return state
    log(f"Starting from the weights of {config.init_from}.")
    if initial_weights.differences:
        log(f"Note: they were trained for another diffusion ({'; '.join(initial_weights.differences)}).")
    return set_params(state, program.abstract_state, initial_weights.params)


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
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
    begin_window = functools.partial(_begin_window, program, options.log_every)
    state = begin_window(step, state)
    preemption, watchdog = Preemption(functools.partial(resume_hint, workdir)), Watchdog(options.stall_timeout)
    profile = TraceProfile(workdir if is_writer else None, options.profile)
    launch.begin(step)
    with contextlib.ExitStack() as stack:
        if is_writer:
            stack.push(lambda kind, error, _: launch.stop(error) if kind else None)
        with launch.measure("start"):
            loader = BatchLoader(config, program, source, step)
            batch, count = loader.next(step)
        compiled = _CompiledSteps(program)
        with log_compilation("the train step"), launch.measure("compile"):
            compiled.get(count, state, batch)
            # Gloo ends processes that begin their first step more than 30 s apart, as slow compilations can be.
            barrier("compiled")
        metrics = stack.enter_context(RunMetrics(config, workdir, step)) if is_writer else None
        bar = stack.enter_context(ProgressBar("Training", options.num_steps, step))
        for context in (loader, watchdog, profile):
            stack.enter_context(context)
        in_flight = StepsInFlight(step)
        outputs = TrainingOutputs(
            config, step, metrics, checkpoints, watchdog, preview, training_fid, launch, in_flight, preemption
        )
        outputs.write_missing(step, state)
        is_timed = handles_signals = False
        while step < options.num_steps:
            with profile.annotate(step):
                state, step_metrics = compiled.get(count, state, batch)(state, batch)
            step += count
            in_flight.add(step, step_metrics["loss"])
            profile.count_call(state)
            if step < options.num_steps:
                with launch.measure("input"):
                    batch, count = loader.next(step)
            in_flight.wait()
            if not handles_signals:  # before, there is nothing to save, and a signal ends the program at once
                stack.enter_context(preemption.install_handler())
                handles_signals = True
            watchdog.record_step()
            note = outputs.log_metrics(step, state)
            state = begin_window(step, state)
            if note:
                profile.check_request()
            if not is_timed and (seconds := in_flight.seconds_per_step()):
                is_timed = True
                _log_duration(config, program, options.num_steps - in_flight.finished, seconds)
            with launch.measure("output"):
                checkpoints.check()
                bar.update(in_flight.finished, note)
                if is_writer:
                    launch.record(in_flight.finished)
            if outputs.write(step, state, preemption.requested()):
                break
        with watchdog.paused():
            with launch.measure("save"):
                checkpoints.finish(step)
            if is_writer:
                launch.record(step, is_last=True)
            is_incomplete = step < options.num_steps or preemption.has_abandoned
            stopped = preemption.stop_exception(step) if is_incomplete else None
        if stopped:
            raise stopped


def _log_duration(config: ConfigDict, program: training.TrainingProgram, num_steps: int, seconds: float) -> None:
    """Logs what the rest of the run takes at `seconds` a step, and how to try a run that takes weeks."""
    duration = seconds * num_steps
    log(
        f"A step takes {format_seconds(seconds)}; the {num_steps:,} steps left take about {format_duration(duration)} on "
        "this device."
    )
    if duration > 7 * 86400:
        batch_size = max(8, program.mesh.size * config.training.accumulation_steps)
        log(
            "Note: that is more than a week. To test this config, use another --workdir with "
            f"--config.training.batch_size={batch_size} --config.training.num_steps=4."
        )


def _begin_window(
    program: training.TrainingProgram, log_every: int, step: int, state: training.TrainState
) -> training.TrainState:
    """The state with an empty window after each multiple of the interval."""
    return state if step % log_every else dataclasses.replace(state, window=program.empty_window())


class _CompiledSteps:
    """The compiled train steps, by the number of steps of a call."""

    def __init__(self, program: training.TrainingProgram):
        self._program, self._compiled = program, {}

    def get(self, count: int, state: training.TrainState, batch) -> Callable:
        """The function of `count` steps, compiled at the first request."""
        if count not in self._compiled:
            function = self._program.train_step if count == 1 else self._program.train_steps
            assert isinstance(function, jax.stages.Wrapped)
            self._compiled[count] = function.lower(state, batch).compile()
        return self._compiled[count]


def _next_command(config: ConfigDict, workdir: pathlib.Path) -> str:
    if is_upsampler(config):
        return "Enlarge images with --mode=sample --config.sampling.low_resolution=PATH."
    if is_classifier(config):
        return f"Guide a model of the same schedule with --mode=sample --config.sampling.classifier={workdir}."
    return "Sample with --mode=sample."
