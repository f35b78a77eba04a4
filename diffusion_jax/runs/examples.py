"""examples.npz: a few training examples that a run stores when training starts, for all of its pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, pictures
from diffusion_jax.console import log
from diffusion_jax.data.sources import batch_examples, read_block_lengths, read_conditions
from diffusion_jax.files import save_npz
from diffusion_jax.metrics.of_arrays import even_indices
from diffusion_jax.models import upsampling
from diffusion_jax.run_dir import RunDir, committed_steps
from diffusion_jax.runs.sampling_setup import SamplingSetup, make_captions
from diffusion_jax.untrusted import open_npz

_FILE = "examples.npz"
_MAX_EXAMPLES, _MAX_VECTORS = 16, 1000  # vectors are points of a histogram
_MAX_CONDITIONED = 256  # enough to find an example near a requested condition
_MAX_BYTES = 2**23
_NUM_CANDIDATES = 128  # further examples that are read to find more classes
_FAR = 1e6  # distance, in standard deviations, between examples with and without a condition
_QUANTILE = 0.005  # share of a channel's values below its lower limit, and above its upper limit


def write_examples(source: data.Source, workdir: RunDir) -> None:
    """Writes examples of many classes, or evenly spread examples, unless the run has a checkpoint.

    A class may be missing if it is rare, or if there are more classes than stored examples (at most 16 for images). The file
    has the arrays of the source, in data units. Call this on process 0 only. source: not normalized.
    """
    if committed_steps(workdir / "checkpoints"):
        return
    first = source.read([0])
    is_conditioned = _is_vector(first.get("condition")) and "label" not in first
    most = _MAX_CONDITIONED if is_conditioned else _MAX_EXAMPLES
    most = _MAX_VECTORS if batch_examples(first).ndim == 2 else most
    count = max(1, min(most, _MAX_BYTES // sum(array.nbytes for array in first.values())))
    first_block, *_ = read_block_lengths(source) or (len(source),)  # later blocks may not be on this machine yet
    batch = source.read(even_indices(first_block, count + (_NUM_CANDIDATES if "label" in first else 0)))
    labels = np.asarray(batch.get("label", np.arange(len(batch_examples(batch)))))
    place = [np.count_nonzero(labels[:i] == y) for i, y in enumerate(labels)]  # rank among the candidates of the class
    chosen = np.lexsort((labels, place))[: max(count, len(np.unique(labels)))]
    chosen = chosen[even_indices(len(chosen), count)]
    path = workdir / _FILE
    save_npz(path, {name: array[chosen] for name, array in batch.items()})
    workdir.upload(path)


def _is_vector(condition: np.ndarray | None) -> bool:
    """Whether `condition` is an array of vectors: [n, number of features]."""
    return condition is not None and condition.ndim == 2


def _read(workdir: RunDir) -> dict[str, np.ndarray]:
    """Returns the arrays of examples.npz; {} if the file is missing or cannot be read."""
    path = workdir / _FILE
    try:
        with open_npz(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log(f"Note: {path} cannot be read, so pictures omit the training examples: {error}.")
        return {}


def read_channels(
    config: ConfigDict, workdir: RunDir, stored: Mapping[str, np.ndarray] | None = None
) -> pictures.Channels:
    """Returns channel names and units from the config, and limits from examples.npz. stored: the arrays, if already read."""
    stored = _read(workdir) if stored is None else stored
    channels = pictures.Channels(tuple(config.data.channel_names), tuple(config.data.channel_units))
    return channels.fit(batch_examples(stored), quantile=_QUANTILE) if stored else channels


def draw_beside_examples(workdir: RunDir, setup: SamplingSetup, samples: np.ndarray, title: str) -> pictures.Picture:
    """Draws samples of a setup beside stored examples, if possible beside the examples with the nearest conditions.

    For an upsampler, each image follows its small image.
    """
    stored, rows, examples = _read(workdir), setup.rows(np.arange(len(samples))), None
    captions, labels = setup.captions(len(samples)), rows["y"]
    low, height = rows["low"], setup.net.low_resolution
    if stored and batch_examples(stored).shape[1:] == setup.net.example_shape:
        x = batch_examples(stored)
        if height:
            x = _pair(np.asarray(upsampling.downsample(x.astype(np.float32), height)).round().astype(x.dtype), x)
        y = None if labels is None else stored.get("label")
        conditions, pairs = read_conditions(stored) if setup.conditions else {}, None
        if y is None and x.ndim > 2 and _is_vector(conditions.get("condition")):
            pairs = _nearest(conditions, rows)
            if not setup.net.is_images and (count := len(setup.conditions["condition"])) < len(samples):
                samples, pairs = samples[:count], pairs[:count]
                title += "; the first sample of each condition"
        examples = pictures.Examples(x, make_captions(setup.net, y, conditions), y, pairs=pairs)
    if low is not None:
        samples = _pair(low, samples)
    if height:
        title += "; each image after its small image"
    channels = read_channels(setup.config, workdir, stored)
    return pictures.draw_samples(samples, title, captions, labels=labels, examples=examples, channels=channels)


def _nearest(stored: Mapping[str, np.ndarray], requested: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns, for each requested condition, the index of the nearest stored condition; distances are in standard deviations.

    Both arguments have "condition" [n, F] and optionally "condition_missing" bool [n], as `SamplingSetup.conditions`.
    Examples without a condition are nearest to each other.
    """
    values, missing = stored["condition"], _missing(stored)
    deviation = values[~missing].std(axis=0) if not missing.all() else np.ones(values.shape[1])
    scale = np.where(deviation > 0, deviation, 1)

    def coordinates(conditions: Mapping[str, np.ndarray]) -> np.ndarray:
        missing = _missing(conditions)[:, None]
        return np.concatenate(
            [np.where(missing, 0.0, np.float64(conditions["condition"]) / scale), _FAR * missing], axis=1
        )

    points = coordinates(stored)
    return np.array([np.square(points - each).sum(axis=1).argmin() for each in coordinates(requested)])


def _missing(conditions: Mapping[str, np.ndarray]) -> np.ndarray:
    return conditions.get("condition_missing", np.zeros(len(conditions["condition"]), bool))


def _pair(low: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Enlarges small images [n, h, w, C] by repeating pixels, and joins each with its image in [n, H, W, C], side by side."""
    side = x.shape[1] // low.shape[1]
    return np.concatenate([low.repeat(side, axis=1).repeat(side, axis=2), x], axis=2)
