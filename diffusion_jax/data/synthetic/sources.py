"""Sources of the laws of this package, and of one recorded series. Each is a function of the config's group `data`.

    --config.data.dataset=diffusion_jax.data.synthetic:series --config.data.image_size="(64,)" --config.data.channels=2

The examples are drawn once, from a seed and the split, and kept in memory.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.synthetic.gaussian_laws import FieldLaw, SeriesLaw
from diffusion_jax.data.synthetic.vector_laws import ConditionalLaw, MixtureLaw, MoonsLaw
from diffusion_jax.errors import DataError

__all__ = [
    "CONDITIONAL",
    "FIELD",
    "MIXTURE",
    "MOONS",
    "NUM_EXAMPLES",
    "SERIES",
    "VOLUME",
    "Examples",
    "conditional",
    "field",
    "mixture",
    "moons",
    "real_series",
    "series",
    "volume",
]

NUM_EXAMPLES = {"train": 20_000, "test": 4_000}

SERIES = SeriesLaw()
FIELD = FieldLaw(
    means=(280.0, 5.0, 0.0, 1000.0, -2.0),
    scales=(10.0, 2.0, 1.0, 20.0, 0.5),
    mixing=(
        (0.9, 0.3, 0.0, 0.2, 0.0),
        (0.6, 0.7, 0.0, 0.0, 0.3),
        (0.0, 0.5, 0.8, 0.0, 0.2),
        (-0.7, 0.0, 0.3, 0.6, 0.0),
        (0.3, 0.0, -0.5, 0.3, 0.7),
    ),
    lengths=((3.0, 1.5), (2.0, 2.0), (1.0, 2.0), (1.5, 1.5), (0.7, 0.7)),
    exponents=(2.0, 1.5, 1.5, 1.5, 1.0),
    shifts=((0, 0), (0, 2), (1, 0), (0, 0), (-2, 1)),
    noise=0.05,
)
VOLUME = FieldLaw(
    means=(0.5,),
    scales=(0.2,),
    mixing=((1.0,),),
    lengths=((2.0, 1.2, 0.8),),
    exponents=(1.5,),
    shifts=((0, 0, 0),),
    noise=0.05,
)
MOONS, MIXTURE, CONDITIONAL = MoonsLaw(), MixtureLaw(), ConditionalLaw()

_SPLITS = ("train", "test")
_TRAIN_START, _TRAIN_END, _TEST_END = 1500, 9000, 10900  # of the recording, in samples
_RECORDING_STEP = 4


class Examples:
    """A source that holds its arrays: "x" float32 [n, *spatial, C], and "condition" float32 [n, D] if there is one.

    law: the law they were drawn from; None for a recording.
    """

    num_classes = 0
    class_names: tuple[str, ...] = ()

    def __init__(self, x: np.ndarray, condition: np.ndarray | None = None, law: Any = None):
        arrays = {"x": x} if condition is None else {"x": x, "condition": condition}
        self.arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        self.law = law

    def __len__(self) -> int:
        return len(self.arrays["x"])

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.arrays.items()}


def series(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 series for training and 4,000 for test, of the law `SERIES`: 2 channels, any length."""
    rng, count = _generator(config, "series", seed)
    (length,) = _spatial_shape(config, "series", 1, len(SERIES.means))
    return Examples(SERIES.sample(rng, count, length), law=SERIES)


def field(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 periodic fields for training and 4,000 for test, of the law `FIELD`: 5 channels, any two sizes."""
    return _periodic(config, "field", FIELD, seed)


def volume(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 periodic volumes for training and 4,000 for test, of the law `VOLUME`: 1 channel, any three sizes."""
    return _periodic(config, "volume", VOLUME, seed)


def moons(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 vectors for training and 4,000 for test, of the law `MOONS`: 2 channels."""
    rng, count = _generator(config, "moons", seed)
    _spatial_shape(config, "moons", 0, 2)
    return Examples(MOONS.sample(rng, count), law=MOONS)


def mixture(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 vectors for training and 4,000 for test, of the law `MIXTURE`: 10 channels."""
    rng, count = _generator(config, "mixture", seed)
    _spatial_shape(config, "mixture", 0, len(MIXTURE.signs[0]))
    return Examples(MIXTURE.sample(rng, count), law=MIXTURE)


def conditional(config: Mapping[str, Any], seed: int = 0) -> Examples:
    """20,000 vectors with conditions for training and 4,000 for test, of the law `CONDITIONAL`: 2 channels."""
    rng, count = _generator(config, "conditional", seed)
    _spatial_shape(config, "conditional", 0, 2)
    condition = CONDITIONAL.sample_conditions(rng, count).astype(np.float32)
    return Examples(CONDITIONAL.sample(rng, condition.astype(np.float64)), condition, CONDITIONAL)


def real_series(config: Mapping[str, Any]) -> Examples:
    """Windows of a neuron's membrane potential in millivolts, 1 channel, of the recording that ships with matplotlib.

    The recording (`membrane.dat`) has a value every 0.5 ms; a series has every fourth, 2 ms apart, and one window starts at
    each value. Windows for training are from 0.75 to 4.5 s of the recording, where the neuron fires regularly at first;
    those for test are from 4.5 to 5.45 s, so no value is in both. The windows of a split overlap and are not independent.
    """
    _check_split(config, "real_series")
    (length,) = _spatial_shape(config, "real_series", 1, 1)
    found = importlib.util.find_spec("matplotlib")  # not imported, because that would take half a second
    if found is None or found.origin is None:
        raise DataError("the data set 'real_series' needs matplotlib: pip install matplotlib")
    path = pathlib.Path(found.origin).parent / "mpl-data" / "sample_data" / "membrane.dat"
    if not path.is_file():
        raise DataError(f"matplotlib lacks its sample data {path}; install matplotlib with pip: pip install matplotlib")
    millivolts = 100 * np.fromfile(path, "<f4")  # the file's unit is 0.1 V
    start, end = (_TRAIN_START, _TRAIN_END) if config["split"] == "train" else (_TRAIN_END, _TEST_END)
    span = (length - 1) * _RECORDING_STEP + 1
    if span > end - start:
        longest = (_TEST_END - _TRAIN_END - 1) // _RECORDING_STEP + 1
        raise DataError(f"data.image_size=({length},) is longer than the recording; use ({longest},) or less")
    windows = np.lib.stride_tricks.sliding_window_view(millivolts[start:end], span)[:, ::_RECORDING_STEP]
    return Examples(windows[..., None])


def _periodic(config: Mapping[str, Any], name: str, law: FieldLaw, seed: int) -> Examples:
    rng, count = _generator(config, name, seed)
    shape = _spatial_shape(config, name, len(law.lengths[0]), len(law.means))
    blocks = (law.sample(rng, 1000, shape).astype(np.float32) for _ in range(count // 1000))  # float64 takes memory
    return Examples(np.concatenate(list(blocks)), law=law)


def _check_split(config: Mapping[str, Any], name: str) -> None:
    if config["split"] not in _SPLITS:
        raise DataError(f"data.split={config['split']!r}: the data set {name!r} has 'train' and 'test'")


def _generator(config: Mapping[str, Any], name: str, seed: int) -> tuple[np.random.Generator, int]:
    """(the generator of a split's draws, the number of examples). Raises: DataError for an unknown split."""
    _check_split(config, name)
    key = (seed, _SPLITS.index(config["split"]), *name.encode())
    return np.random.default_rng(key), NUM_EXAMPLES[config["split"]]


def _spatial_shape(config: Mapping[str, Any], name: str, axes: int, channels: int) -> tuple[int, ...]:
    """The size of each spatial axis. Raises: DataError for another number of axes or channels than the data set has."""
    size = config["image_size"]
    shape = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(shape) != axes:
        example = {0: "()", 1: "(64,)", 2: "(16, 16)", 3: "(8, 8, 8)"}[axes]
        raise DataError(
            f"data.image_size={size!r}: the data set {name!r} has {axes} spatial axes; use a tuple of {axes}, like {example}"
        )
    if config["channels"] != channels:
        raise DataError(f"data.channels={config['channels']!r}: the data set {name!r} has {channels}; use {channels}")
    return shape
