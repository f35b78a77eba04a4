"""The work directory: config.json, metrics.jsonl, TensorBoard events, samples/ and checkpoints/."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.distributed.processes import broadcast_from_process_0
from diffusion_jax.errors import UserError
from diffusion_jax.training.digests import committed_steps

# What makes two launches the same run; the rest (lengths, intervals, devices, sampling, where the data lies) may change.
_IDENTITY_GROUPS = ("model", "diffusion", "optimizer", "ema", "data")
_NOT_IDENTITY = {"data.data_dir", "data.download", "data.workers", "data.memory_mb", "model.convolution"}


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested leaves as {"group.leaf": value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def identity(config: Mapping) -> dict[str, Any]:
    """The leaves that must agree between the launches of one run."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key in ("seed", "training.batch_size")
        or (key.split(".")[0] in _IDENTITY_GROUPS and key not in _NOT_IDENTITY)
    }


def to_dict(config: ConfigDict) -> dict:
    """A config as plain JSON values."""
    return json.loads(config.to_json())


def read_config(workdir: pathlib.Path) -> dict | None:
    """The stored config, or None where there is none. Raises: UserError for one that cannot be read."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        if isinstance(config, dict):
            return config
        error = "not a dictionary"
    except (ValueError, OSError) as caught:
        error = str(caught)
    raise UserError(f"{path} is no config ({error}); was it edited?")


def check_identity(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises: UserError, with every key that differs, where the directory holds another run.

    Without a checkpoint it holds none: a launch that failed, or was stopped, before its first may be launched anew with
    another config.
    """
    stored = read_config(workdir)
    if stored is None or not committed_steps(workdir / "checkpoints"):
        return
    old, new = identity(stored), identity(to_dict(config))
    differing = [key for key in new if key in old and old[key] != new[key]]
    if not differing:
        return
    listed = "; ".join(f"{key}: {old[key]!r} there, {new[key]!r} here" for key in differing)
    advice = "use another --workdir, or its config"
    if not any(key.startswith(("model.", "diffusion.")) for key in differing):
        changed = " ".join(f"--config.{key}={new[key]}" for key in differing)
        advice += f"; to begin a new run with its weights: --pretrained={workdir} --workdir=NEW {changed}"
    raise UserError(f"{workdir} holds another run ({listed}); {advice}")


def check_seed(name: str, seed: int) -> None:
    """Raises: UserError for a seed that 32 bits do not hold."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{name}={seed} must lie in 0 ... {2**32 - 1}")


def check_data(source, workdir: pathlib.Path) -> None:
    """Stores what the images of a run are: their number, a digest of 64 of them and of their labels, and the names of the
    classes.

    Raises: UserError where they are others and the run has a checkpoint.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, 64).astype(int))
    images, labels = source.read(chosen)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + np.asarray(labels, np.int32).tobytes()).hexdigest()
    names, path = list(getattr(source, "class_names", ())), workdir / "data.json"
    now = {"images": len(source), "sha256_of_some": digest, "classes": names}
    begun = path.exists() and committed_steps(workdir / "checkpoints")
    before = json.loads(path.read_text()) if begun else None
    if before is not None and {"classes": names, **before} != now:  # runs of version 0.1 have no names
        renamed = f"classes {', '.join(before['classes'])} then, {', '.join(names)} now" if "classes" in before else ""
        other = renamed if renamed and before["classes"] != names else "or others"
        raise UserError(
            f"the images are not those that {workdir} was begun with ({before['images']:,} then, {len(source):,} now, "
            f"{_shortened(other)}): bring them back, begin in another --workdir, or, to go on with these, remove {path}"
        )
    if before != now:
        write_text(path, json.dumps(now) + "\n")


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def class_names(config: Mapping, workdir: pathlib.Path) -> tuple[str, ...]:
    """The names of the classes that samples can have, () if they are not known: those of the data that the run was trained
    on, of the run that `init_from` names, or, for a model without classes, of the guiding classifier's run."""
    places = [workdir, config["init_from"]] if config["model"]["num_classes"] else [config["sampling"]["classifier"]]
    for place in filter(None, places):
        try:
            stored = json.loads((pathlib.Path(place).expanduser() / "data.json").read_text())
            return tuple(map(str, stored["classes"]))
        except (OSError, ValueError, KeyError, TypeError):  # weights of others, or a run of version 0.1
            continue
    return ()


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Stores the config of this launch."""
    write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def keep_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Stores the config of a launch that draws from or measures weights of others, before anything is trained: then the
    directory alone names them at the next launch. The config of a run that has a checkpoint stays.
    """
    if config.init_from and not committed_steps(workdir / "checkpoints"):
        broadcast_from_process_0(lambda: workdir.mkdir(parents=True, exist_ok=True) or write_config(config, workdir))


def import_writers() -> None:
    """Begins in a thread the import of what `Metrics` writes with, which takes seconds: for when a program is compiled."""

    def begin():
        with contextlib.suppress(ImportError):  # said where the writers are needed
            importlib.import_module("clu.metric_writers")

    threading.Thread(target=begin, daemon=True).start()


class Metrics:
    """metrics.jsonl and TensorBoard events, which agree: both are cut back to the step that a launch starts from.

    What cannot be written raises UserError, with exit code 1.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        import tensorflow as tf  # clu's writers need it; imported here because it takes seconds

        tf.config.set_visible_devices([], "GPU")  # TensorFlow must not take the accelerator's memory
        from clu import metric_writers

        self._path, self._library_error = workdir / "metrics.jsonl", tf.errors.OpError
        with self._writing():
            self._cut_lines(step)
            self._cut_events(tf, workdir, step)
            self._events = metric_writers.SummaryWriter(str(workdir))
            self._lines = self._path.open("a")

    def _cut_lines(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
                continue
        write_text(self._path, "".join(kept))

    @staticmethod
    def _cut_events(tf, workdir: pathlib.Path, step: int) -> None:
        for path in sorted(workdir.glob("events.out.tfevents.*")):
            records = []
            try:
                for record in tf.compat.v1.io.tf_record_iterator(str(path)):
                    if tf.compat.v1.Event.FromString(record).step <= step:
                        records.append(record)
            except tf.errors.DataLossError:  # the end of a killed run's file may be torn
                pass
            temporary = path.with_name("partial." + path.name)
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for record in records:
                    writer.write(record)
            os.replace(temporary, path)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else the first error is the one to tell
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._library_error) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"the logs below {self._path.parent} cannot be written ({reason}); is the disk full? The checkpoints are "
                "kept, and the same command goes on from the newest",
                exit_code=1,
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and one point of each curve."""
        with self._writing():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
            self._events.write_scalars(step, dict(values))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 picture [H, W, C] among TensorBoard's images."""
        with self._writing():
            self._events.write_images(step, {name: picture[None]})

    def flush(self) -> None:
        """Makes what was written last, before the checkpoint that a relaunch would start from."""
        with self._writing():
            self._events.flush()
            self._lines.flush()
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes both."""
        with self._writing():
            try:
                self.flush()
            finally:
                self._events.close()
                self._lines.close()
