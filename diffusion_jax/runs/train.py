"""`--mode=train` and `train_classifier`: one run from its config to its last checkpoint, or from its last one onwards."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.distributed import preemption, sharding
from diffusion_jax.distributed.file_lock import locked
from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError, as_user_error
from diffusion_jax.runs import pictures, trained_model
from diffusion_jax.runs import workdir as work
from diffusion_jax.runs.console import Bar, bar_over, compiling, say
from diffusion_jax.runs.sample import Generator, check_options
from diffusion_jax.runs.sample_metrics import TrainingFid, check_sample_metrics
from diffusion_jax.runs.sampling_setup import SamplingSetup, class_captions
from diffusion_jax.training.checkpoints import Checkpoints, committed_steps


def train(config: ConfigDict, directory: pathlib.Path) -> None:
    """Trains until `training.num_steps`, leaving checkpoints, metrics and pictures in `directory`.

    Raises: UserError for a config that cannot be run, a directory that holds another run, or a loss that is not finite.
    """
    _check(config)
    work.check_identity(config, directory)
    with as_user_error("config"):
        built = training.setup(config)
        _check_sampling(config, built, work.class_names(config, directory))
        preview = _drawing(config, built, config.sampling.preview_samples)
        judging = _drawing(config, built, config.sampling.batch_size) if config.evaluation.every else None
    if config.evaluation.every and not judging:
        raise UserError(
            f"evaluation.every={config.evaluation.every} is for models that draw images from nothing; use 0"
        )
    options = config.training
    if _is_finished(config, directory):
        return
    source = data.load(config.data, bar_over("Reading the images"), say)
    check_source(config, source)
    with as_user_error("config"):
        _check_sampling(config, built, getattr(source, "class_names", ()), named=True)
    begun = broadcast_from_process_0(lambda: committed_steps(directory / "checkpoints"))
    beginning = trained_model.initial(config, built.model) if config.init_from and not begun else None
    broadcast_from_process_0(lambda: directory.mkdir(parents=True, exist_ok=True))
    distance = judging and TrainingFid(config, directory, judging)
    keeping = (options.checkpoints_kept, options.checkpoint_keep_every)
    with (
        locked(directory / ".lock", f"is training in {directory}"),
        Checkpoints(directory / "checkpoints", *keeping) as checkpoints,
    ):
        broadcast_from_process_0(lambda: work.check_data(source, directory))
        state = checkpoints.restore(built.abstract_state)
        step = 0 if state is None else int(state.step)
        if state is None:
            with compiling("the initialization"):
                state = built.init()
            if beginning:
                state = _begin_with(config, built, state, *beginning)
        del beginning  # as large as the network
        broadcast_from_process_0(lambda: work.write_config(config, directory))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        say(f"{len(source):,} images, {parameters:,} parameters, batch {options.batch_size}.")
        say(f"Continuing from step {step}." if step else "Starting from step 0.")
        _Loop(config, directory, built, checkpoints, preview, distance).run(state, step, source)
    then = "Sample with --mode=sample."
    if training.is_upsampler(config):
        then = "Enlarge images with --mode=sample --config.sampling.low_resolution=PATH."
    elif training.is_classifier(config):
        then = f"Guide a model of the same schedule with --mode=sample --config.sampling.classifier={directory}."
    say(f"Done: {options.num_steps} steps, in {directory}. {then}")


def _is_finished(config: ConfigDict, directory: pathlib.Path) -> bool:
    """Whether the last step is there, and whole; says so."""
    num_steps = config.training.num_steps
    if max(broadcast_from_process_0(lambda: committed_steps(directory / "checkpoints")), default=0) < num_steps:
        return False
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.whole_step() or 0
    if newest < num_steps:
        return False
    say(f"This run is finished: {directory} holds step {newest} of {num_steps}. Nothing to do.")
    return True


def _begin_with(
    config: ConfigDict, built: training.Setup, state: training.TrainState, params, differing: list[str]
) -> training.TrainState:
    """A fresh state with the weights that `config.init_from` names, and their average the same."""
    say(f"The weights are those of {config.init_from}.")
    if differing:
        say(f"Note: they were trained for another diffusion ({'; '.join(differing)}).")
    copies = [
        jax.tree.map(lambda leaf, place: jax.device_put(jnp.copy(leaf), place.sharding), params, places)
        for places in (built.abstract_state.params, built.abstract_state.ema_params)
    ]
    return state.replace(params=copies[0], ema_params=copies[1])


def _check(config: ConfigDict) -> None:
    """What can be seen to be wrong before anything is built."""
    options = config.training
    with as_user_error("config"):
        training.check_whole_numbers(config)
    if not options.stall_timeout >= 0:
        raise UserError(f"training.stall_timeout={options.stall_timeout} must be at least 0 seconds (0 for never)")
    work.check_seed("seed", config.seed)
    check_sample_metrics(config)
    intervals = {f"training.{leaf}": options[leaf] for leaf in ("log_every", "sample_every", "checkpoint_every")}
    for name, interval in (intervals | {"evaluation.every": config.evaluation.every}).items():
        if interval % options.steps_per_call:
            raise UserError(f"{name}={interval} must be a multiple of training.steps_per_call={options.steps_per_call}")


def check_source(config: ConfigDict, source) -> None:
    """Raises: UserError or DataError where labels do not fit the network, or gray levels the bound that is trained."""
    if config.diffusion.loss in ("vlb", "hybrid"):
        data.check_levels(source.read(np.arange(min(64, len(source))))[0], config.data.levels)
    classes = config.model.num_classes
    if classes and source.num_classes > classes:
        raise UserError(f"model.num_classes={classes}, but the data has {source.num_classes} classes; use that, or 0")
    if classes and not source.num_classes:
        advice = "a classifier needs labeled images" if training.is_classifier(config) else "use model.num_classes=0"
        reason = getattr(source, "no_labels_reason", "")
        raise UserError(
            f"model.num_classes={classes}, but the data has no labels{f' ({reason})' if reason else ''}; {advice}"
        )


def _check_sampling(config: ConfigDict, built: training.Setup, class_names: Sequence[str], named: bool = False) -> None:
    """Raises what --mode=sample would, but for what weights of a guiding classifier decide.

    named: whether `class_names` are all that there will be: else the data, not read yet, may name the classes asked for.
    """
    if training.is_classifier(config):
        return
    check_options(config)
    label = config.sampling.label
    spelled = any(isinstance(y, str) for y in (label if isinstance(label, tuple | list) else [label]))
    if spelled and built.model.num_classes and not (named or class_names):
        config = config.copy_and_resolve_references()
        config.sampling.label = None
    SamplingSetup(config, built.model, built.schedule, built.mesh, class_names, load_classifier=False)


def _drawing(config: ConfigDict, built: training.Setup, count: int) -> Generator | None:
    """A sampler for the time of training, of about `count` images: DDIM, few steps. None where none is possible."""
    if count < 1 or training.is_classifier(config) or training.is_upsampler(config):
        return None
    options = work.to_dict(config)
    options["sampling"] |= {
        "sampler": "ddim",
        "steps": min(config.sampling.preview_steps, built.schedule.num_timesteps),
        "spacing": "trailing",
        "eta": 0.0,
        "guidance_scale": 1.0,
        "classifier": "",
        "label": None,
    }
    config = ConfigDict(options)
    recipe = SamplingSetup(config, built.model, built.schedule, built.mesh)
    devices = built.mesh.size
    return Generator(config, recipe, built.mesh, max(1, count // devices) * devices)


class _Times:
    """Where the time since the last line of the log went."""

    def __init__(self):
        self._restart()

    def _restart(self) -> None:
        self._began, self._spent = time.perf_counter(), {"data_wait": 0.0, "logging": 0.0}

    @contextlib.contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """Counts what is done inside as time spent on that."""
        start = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - start

    def split(self) -> dict[str, float]:
        """{"seconds": since the last call, and the fractions of them: "data_wait" (the loop waited for data), "logging"
        (lines, pictures and checkpoints), "compute" (the rest, in which the devices do the steps)}."""
        seconds = time.perf_counter() - self._began
        fractions = {name: spent / seconds for name, spent in self._spent.items()}
        self._restart()
        return {"seconds": seconds, "compute": 1 - sum(fractions.values()), **fractions}


class _Profile:
    """Traces the sixth to the tenth call of the train step into `directory`, for XProf; None for never."""

    _CALLS = range(5, 10)  # after those that fill the caches

    def __init__(self, directory: pathlib.Path | None):
        self._directory, self._call, self._tracing = directory, 0, False

    def __enter__(self) -> _Profile:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:  # the run ended before the tenth call
            self._stop()

    def step(self, step: int):
        """The context of one call."""
        if self._directory and self._call == self._CALLS.start:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, state) -> None:
        """The call was made."""
        self._call += 1
        if self._tracing and self._call == self._CALLS.stop:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        say(f"A trace of the train step: xprof --logdir={self._directory} (pip install xprof).")


class _Loop:
    """The training loop and what it does at its intervals."""

    def __init__(
        self,
        config: ConfigDict,
        directory: pathlib.Path,
        built: training.Setup,
        checkpoints: Checkpoints,
        preview: Generator | None,
        distance: TrainingFid | None,
    ):
        self._config, self._directory, self._built = config, directory, built
        self._checkpoints, self._preview, self._distance = checkpoints, preview, distance
        self._metrics: work.Metrics | None = None
        self._programs: dict = {}
        self._pictured = False
        self._class_names: tuple[str, ...] = ()

    def run(self, state: training.TrainState, step: int, source) -> None:
        """From `step` to the end."""
        self._class_names = getattr(source, "class_names", ())
        options = self._config.training
        rows = sharding.process_rows(options.batch_size, self._built.mesh)
        batches = data.Batches(source, self._config.seed, options.batch_size, options.num_steps, rows)
        workers = 0 if isinstance(source, data.InMemory) else self._config.data.workers
        stream = data.stream(batches, step, workers)
        if options.steps_per_call > 1 and not self._built.train_steps:
            say(f"On the CPU, the {options.steps_per_call} steps of a call are made one by one: that is faster there.")
        batch, count = self._next(stream, step)
        if jax.process_index() == 0:
            work.import_writers()
        with compiling("the train step"):
            self._program(count, state, batch)

        stopping, self._watchdog = preemption.Preemption(self._directory), preemption.Watchdog(options.stall_timeout)
        profile = _Profile(self._directory if options.profile and jax.process_index() == 0 else None)
        with contextlib.ExitStack() as during:
            if jax.process_index() == 0:
                self._metrics = during.enter_context(work.Metrics(self._directory, step))
            bar = during.enter_context(Bar("Training", options.num_steps, step))
            if workers:  # or the memory that they share is reported as leaked
                during.enter_context(contextlib.closing(stream))
            for context in (stopping.handled(), self._watchdog, profile):
                during.enter_context(context)
            times, logged = _Times(), step
            while step < options.num_steps:
                with profile.step(step):
                    state, _ = self._program(count, state, batch)(state, batch)
                self._watchdog.beat()
                step += count
                profile.after(state)
                last, asked = step == options.num_steps, stopping.asked()
                if not (last or asked):
                    with times.spent("data_wait"):
                        batch, count = self._next(stream, step)
                note = ""
                if step % options.log_every == 0 or last:
                    means = training.window_means(self._finite(state))
                    self._watchdog.beat()
                    split = times.split()
                    with times.spent("logging"):
                        note = self._log(step, step - logged, means, split)
                    logged = step
                with times.spent("logging"):
                    self._checkpoints.check()
                    bar.update(step, note)
                    # The picture first: a run that ends after its checkpoint would not come back for it.
                    if options.sample_every and (last or step % options.sample_every == 0):
                        self._picture(state, step)
                    every = self._config.evaluation.every
                    if self._distance and (last or step % every == 0):
                        self._judge(state, step)
                    if step % options.checkpoint_every == 0 or last or asked:
                        self._save(state, step)
                if asked and not last:
                    with self._watchdog.paused():
                        self._checkpoints.finish(step)
                        stopped = stopping.stopped(step)
                    raise stopped
            with self._watchdog.paused():
                self._checkpoints.finish(step)

    def _program(self, count: int, state, batch):
        """The compiled program of `count` steps."""
        if count not in self._programs:
            function = self._built.train_step if count == 1 else self._built.train_steps
            self._programs[count] = function.lower(state, batch).compile()
        return self._programs[count]

    def _log(self, step: int, steps: int, means: dict[str, float], split: dict[str, float]) -> str:
        """Writes the means of the steps since the last line, and the speed; returns a note for the bar."""
        options = self._config.training
        seconds = split.pop("seconds")
        training_seconds = seconds * (1 - split["logging"])  # the speed is that of training alone
        speed = {
            "images_per_second": steps * options.batch_size / training_seconds,
            "seconds_left": (options.num_steps - step) * seconds / steps,
            "step_seconds": seconds / steps,
            **split,
        }
        if self._metrics:
            self._metrics.scalars(step, means | speed)
        return f"loss {means['loss']:.4f}  {speed['images_per_second']:,.0f} images/s"

    def _next(self, stream, step: int):
        """The next batch on the devices, and how many steps it is for.

        Several steps make one call where they end at a multiple of `steps_per_call`, so that no interval is stepped over
        after a relaunch with another `steps_per_call`; the steps up to there, and a rest at the end, are single.
        """
        options = self._config.training
        count = options.steps_per_call
        if not self._built.train_steps or step % count or step + count > options.num_steps:
            return self._place(self._read(stream), 0), 1
        several = [self._read(stream) for _ in range(count)]
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *several), 1), count

    @staticmethod
    def _read(stream):
        """Raises: UserError where a process that decodes was killed."""
        try:
            return next(stream)
        except RuntimeError as error:  # Grain's
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                "a process that reads the data was killed: for want of memory? (data.workers=N decides how many there are); "
                "the same command goes on from the last checkpoint",
                preemption.LOST,
            ) from error

    def _place(self, batch, leading: int):
        place = sharding.batch_sharding(self._built.mesh, leading)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(place, leaf), batch)

    def _finite(self, state):
        """The fetched window. Raises: UserError where a loss or gradient was not finite."""
        window = jax.device_get(state.window)
        if window["nonfinite_step"] >= 0:
            saved = self._checkpoints.steps()
            kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there was no checkpoint yet"
            raise UserError(
                f"the loss, its gradient or the parameters were not finite at step {window['nonfinite_step']} ({kept}); "
                "try, in a new --workdir, a lower optimizer.learning_rate, a longer optimizer.warmup_steps, "
                "optimizer.grad_clip=1.0, or model.dtype=float32",
                exit_code=1,
            )
        return window

    def _save(self, state, step: int) -> None:
        self._finite(state)
        if self._metrics:
            self._metrics.flush()  # what is logged up to here must outlive the checkpoint that continues from here
        with self._watchdog.paused():
            self._checkpoints.save(step, state)

    def _judge(self, state, step: int) -> None:
        """Logs the Frechet distance of a few samples, drawn with the EMA weights."""
        with self._watchdog.paused():
            figure = self._distance(state.ema_params)
        say(f"{self._distance.name} {figure:.4g} at step {step}")
        if self._metrics:
            self._metrics.scalars(step, {self._distance.name: figure})

    def _picture(self, state, step: int) -> None:
        """A grid drawn with the EMA weights, as PNG and among TensorBoard's images."""
        preview = self._preview
        if preview is None:
            return
        if not self._pictured:
            say("Compiling the sampler of the pictures ...")
            self._pictured = True
        with self._watchdog.paused():
            images = preview(state.ema_params, self._config.sampling.seed)
        if not self._metrics:
            return
        labels = preview.recipe.labels(np.arange(len(images)))
        captions = None if labels is None else class_captions(labels, self._class_names)
        picture = pictures.grid(images, captions=captions)
        try:
            (self._directory / "samples").mkdir(exist_ok=True)
            pictures.save_png(self._directory / "samples" / f"train_step{step:08d}.png", picture)
        except OSError as error:  # a picture is not worth the run
            say(f"Note: the picture of step {step} could not be written: {error}.")
        self._metrics.picture(step, "samples", picture)
