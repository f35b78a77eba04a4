"""TensorBoard's event files, written and read with TensorBoard alone: TensorFlow's import takes seconds."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from diffusion_jax.files import atomic_write
from diffusion_jax.storage.locations import EVENTS

__all__ = ["EventFile", "truncate_events"]

_Event, _Summary = cast(Any, event_pb2).Event, cast(Any, summary_pb2).Summary
_FILE_NUMBERS = itertools.count()  # two files of one process may be created in the same second


class EventFile:
    """Appends to a new event file in a directory. Raises: OSError."""

    def __init__(self, directory: pathlib.Path):
        name = f"{EVENTS}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILE_NUMBERS):06d}"
        self._writer = RecordWriter((directory / name).open("wb"))
        self._write(_Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._writer.flush()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def _write_value(self, step: int, tag: str, tensor: Any, metadata: Any) -> None:
        summary = _Summary(value=[_Summary.Value(tag=tag, tensor=make_tensor_proto(*tensor), metadata=metadata)])
        self._write(_Event(wall_time=time.time(), step=step, summary=summary))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Writes a number."""
        self._write_value(step, tag, (value, np.float32), scalar_metadata.create_summary_metadata(None, None))

    def text(self, tag: str, text: str, step: int) -> None:
        """Writes a text in Markdown."""
        self._write_value(step, tag, (text.encode(),), text_metadata.create_summary_metadata(None, None))

    def images(self, tag: str, images: np.ndarray, step: int, caption: str) -> None:
        """Writes images uint8 [N, H, W, C]. caption: what they show."""
        height, width = images.shape[1:3]
        strings = [str(width).encode(), str(height).encode(), *map(_encode_png, images)]
        metadata = image_metadata.create_summary_metadata(None, caption)
        self._write_value(step, tag, (strings,), metadata)

    def hyperparameters(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Writes the hyperparameters of the run."""
        self._write(_Event(wall_time=time.time(), summary=hparams.hparams_pb(dict(values))))

    def flush(self) -> None:
        """Passes all events to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def truncate_events(directory: pathlib.Path, step: int) -> None:
    """Removes the events beyond a step, and its config, from all event files of a directory. Raises: OSError."""
    for leftover in directory.glob(f"{EVENTS}*.partial.*"):  # of a launch that was killed in this function
        leftover.unlink()
    for path in sorted(directory.glob(f"{EVENTS}*")):
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            for record in _records(path):
                if _is_kept(_Event.FromString(record), step):
                    writer.write(record)


def _is_kept(event: Any, step: int) -> bool:
    """Whether a launch from this step keeps an event: it writes the later ones again, and its own config."""
    is_config = any(value.tag == "config" or value.tag.startswith("_hparams_/") for value in event.summary.value)
    return event.step < step or (event.step == step and not is_config)


def _records(path: pathlib.Path):
    """Yields the records of a file; the last one of a killed run may be incomplete and is left out."""
    reader = pywrap_tensorflow.PyRecordReader_New(str(path))
    while True:
        try:
            reader.GetNext()
        except (errors.OutOfRangeError, errors.DataLossError):
            return
        yield reader.record()
