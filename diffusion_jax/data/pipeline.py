"""From a source to batches: batch = f(seed, step), so a relaunch needs nothing but the step it stopped at.

The examples stand in one endless row: every epoch is a fresh permutation, the epochs follow one another without a gap,
and step s reads places s B ... (s + 1) B - 1 of the row. A batch may span two epochs; no example is ever left out.
"""

from __future__ import annotations

import functools
import signal

import grain
import numpy as np
from absl import flags


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def example_indices(seed: int, num_examples: int, places) -> np.ndarray:
    """Which example stands at each place of the endless row. places: int [...]; returns int64 [...]."""
    places = np.asarray(places, np.int64)
    indices = np.empty_like(places)
    epochs = places // num_examples
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, num_examples)[places[here] % num_examples]
    return indices


class Batches:
    """Batches by step: `batches[step] -> {"image": uint8 [rows, H, W, C], "label": int32 [rows]}`.

    source: anything of `data.sources`. batch_size: of all processes together. rows: a slice or indices, the part of
    each batch that this process reads; all of it unless given.
    """

    def __init__(self, source, seed: int, batch_size: int, num_steps: int, rows=slice(None)):
        self._source, self._seed, self._batch_size, self._num_steps = source, seed, batch_size, num_steps
        self._rows = np.arange(batch_size)[rows]

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        indices = example_indices(self._seed, len(self._source), step * self._batch_size + self._rows)
        images, labels = self._source.read(indices)
        return {"image": images, "label": labels}


def _ignore_ctrl_c(index: int, count: int) -> None:
    """A terminal sends Ctrl-C to these processes too, but the one that reads from them may still have a step to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stream(batches: Batches, start: int = 0, workers: int = 0, ahead: int = 4):
    """Iterates over the batches from `start` on, read ahead by Grain.

    workers: processes that decode, whole batches each; 0 for a thread of this process, right for data in memory.
    ahead: batches kept ready (by each worker, where there are any).
    """
    rest = grain.MapDataset.source(batches)[start:]
    iterable = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
    if workers:
        if (
            not flags.FLAGS.is_parsed()
        ):  # Grain reads absl flags before it starts workers; outside app.run they have defaults
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_ignore_ctrl_c)
    return iter(iterable)
