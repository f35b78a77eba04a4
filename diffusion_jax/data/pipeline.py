"""Batches of a source as a function of (seed, step), so that a run resumes from the number of its last step.

The examples form one endless sequence: every epoch is a new permutation, the epochs follow one another without a gap, and
step s reads positions s B ... (s + 1) B - 1. A batch may span two epochs; no example is omitted.
"""

from __future__ import annotations

import functools
import signal
from typing import TYPE_CHECKING

import numpy as np

from diffusion_jax.data.sources import Source

if TYPE_CHECKING:
    import grain

__all__ = ["Batches", "example_indices", "stream"]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def example_indices(seed: int, num_examples: int, positions) -> np.ndarray:
    """The index int64 [...] of the example at each position int [...] of the endless sequence."""
    positions = np.asarray(positions, np.int64)
    indices = np.empty_like(positions)
    epochs = positions // num_examples
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(seed, epoch, num_examples)[positions[in_epoch] % num_examples]
    return indices


class Batches:
    """Batches by step: `batches[step]` is what the source reads: {"image": uint8 [rows, H, W, C], ...}.

    batch_size: of all processes together. rows: a slice or indices, the rows of each batch that this process reads, by
    default all.
    """

    def __init__(
        self, source: Source, seed: int, batch_size: int, num_steps: int, rows: slice | np.ndarray = slice(None)
    ):
        self._source, self._seed, self._batch_size, self._num_steps = source, seed, batch_size, num_steps
        self._rows = np.arange(batch_size)[rows]

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        indices = example_indices(self._seed, len(self._source), index * self._batch_size + self._rows)
        return self._source.read(indices)


def _ignore_ctrl_c(index: int, count: int) -> None:
    """Ignores SIGINT in workers, because a terminal sends it to them too, and the main process still reads their batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stream(
    batches: Batches, start: int = 0, workers: int = 0, prefetch: int = 4
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterates over the batches from step `start`, prefetched by Grain.

    workers: processes that decode, whole batches each; 0 for a thread of this process, which suits data in memory.
    prefetch: the number of batches that are read ahead (by each worker).
    """
    import grain  # it and absl's flags are imported here because refusals of other data do not need them
    from absl import flags

    dataset = grain.MapDataset.source(batches)[start:]
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
    if workers:
        # Grain reads absl flags before it starts workers; without absl's app.run they keep their defaults.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_ignore_ctrl_c)
    return iter(iterable)
