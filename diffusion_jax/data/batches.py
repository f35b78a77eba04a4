"""Batches by step, and the order of the examples.

Batches are a function of (seed, step), so that a run resumes from its last step number, on any number of processes. Each
example is read once in each epoch; a batch may span two or more epochs.

A source may consist of blocks that are read together, such as the files of a data set in a bucket. An epoch permutes the
blocks. The rows of a batch form lanes. Each lane reads its own share of the permuted blocks, so a process downloads only the
blocks of its rows. Within a lane, the examples of two consecutive blocks (a window) are shuffled. A source without blocks has
one block, one lane and one window: each epoch is a permutation of all examples.
"""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING

import numpy as np

from diffusion_jax.data.sources import Source, read_block_lengths

if TYPE_CHECKING:
    import grain

_MAX_LANES = 16
_BLOCKS_IN_WINDOW = 2
_AHEAD, _AHEAD_OF_BLOCKS = 4, 16  # batches that a worker reads ahead; 16 are ready while the next block is downloaded


class Batches:
    """Batches by step: `batches[step]` is the source's dict of arrays: {"image": uint8 [rows, H, W, C], ...}.

    batch_size: rows over all processes. rows: a slice or indices of the rows that this process reads; by default all rows.
    num_blocks: the number of blocks in the source.
    """

    def __init__(
        self, source: Source, seed: int, batch_size: int, num_steps: int, rows: slice | np.ndarray = slice(None)
    ):
        self._source, self._seed, self._batch_size, self._num_steps = source, seed, batch_size, num_steps
        self.rows = np.arange(batch_size, dtype=np.int64)[rows]
        self._block_lengths = read_block_lengths(source) or (len(source),)
        self.num_blocks = len(self._block_lengths)
        num_lanes = math.gcd(batch_size, _MAX_LANES)
        while num_lanes > 1 and num_lanes * _BLOCKS_IN_WINDOW > self.num_blocks:
            num_lanes //= 2
        self._lane_ends = np.arange(num_lanes + 1) * len(source) // num_lanes
        self._window = -(-len(source) // self.num_blocks) * _BLOCKS_IN_WINDOW
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.read_rows(step, self.rows)

    def read_rows(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads rows of the batch at a step."""
        return self._source.read(self.indices(step, rows))

    def indices(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Returns the indices, int64 [n], of the examples in n rows of the batch at a step."""
        num_lanes = len(self._lane_ends) - 1
        lanes, places = np.divmod(rows, self._batch_size // num_lanes)
        starts, lengths = self._lane_ends[lanes], np.diff(self._lane_ends)[lanes]
        epochs, positions = np.divmod(step * (self._batch_size // num_lanes) + places, lengths)
        # Lanes begin a window at different steps, so that downloads are spread evenly.
        shifts = lanes * self._window // num_lanes
        windows = (positions + shifts) // self._window
        lows = np.maximum(windows * self._window - shifts, 0)
        highs = np.minimum((windows + 1) * self._window - shifts, lengths)
        indices = np.empty_like(positions)
        for epoch, low, high in np.unique(np.stack([epochs, starts + lows, starts + highs]), axis=1).T.tolist():
            in_window = (epochs == epoch) & (starts + lows == low)
            indices[in_window] = self._order(epoch, low, high)[(starts + positions)[in_window] - low]
        return indices

    def _order(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Returns the shuffled example indices of a window, positions low ... high - 1 of an epoch; keeps recent results."""
        order = self._orders.get((epoch, low))
        if order is None:
            while len(self._orders) >= 2 * (len(self._lane_ends) - 1):
                self._orders.pop(next(iter(self._orders)))
            order = self._orders[epoch, low] = _shuffle(self._seed, epoch, low, high, self._block_lengths)
        return order


def _shuffle(seed: int, epoch: int, low: int, high: int, block_lengths: tuple[int, ...]) -> np.ndarray:
    """Returns shuffled example indices, int64 [high - low]: positions low ... high - 1 of an epoch's permuted blocks."""
    positions = low + np.random.default_rng((seed, epoch, low)).permutation(high - low)
    if len(block_lengths) == 1:
        return positions
    lengths = np.array(block_lengths)
    blocks = np.random.default_rng((seed, epoch, 0, 1)).permutation(len(lengths))
    ends = np.cumsum(lengths[blocks])
    rank = np.searchsorted(ends, positions, "right")
    offsets = positions - (ends - lengths[blocks])[rank]
    return (np.cumsum(lengths) - lengths)[blocks[rank]] + offsets


def stream(batches: Batches, start: int = 0, workers: int = 0) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterates over the batches from step `start`, prefetched by Grain.

    workers: processes that decode; 0 for a thread in this process, which suits data in memory. Each worker reads whole
    batches, or for data with blocks, its own rows of each batch, so that it downloads only the blocks of these rows.
    """
    import grain  # grain and absl's flags are slow to import, and only this function needs them
    from absl import flags

    prefetch, parts = _AHEAD, 1
    if batches.num_blocks > 1:
        prefetch, parts = _AHEAD_OF_BLOCKS, max(1, min(workers, len(batches.rows)))
        workers = min(workers, parts)
    rows = np.array_split(batches.rows, parts)  # each worker reads every n-th element, so always the same rows
    dataset = grain.MapDataset.range(start * parts, len(batches) * parts)
    dataset = dataset.map(lambda i: batches.read_rows(i // parts, rows[i % parts]))
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
    if workers:
        # Grain reads absl's flags before it starts workers, which fails in a program that has not parsed the flags.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)

        def ignore_ctrl_c(index: int, count: int) -> None:
            # A terminal sends SIGINT to workers too, but the main process still reads their batches.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        iterable = iterable.mp_prefetch(options, ignore_ctrl_c)
    if parts > 1:
        iterable = iterable.batch(
            parts, batch_fn=lambda found: {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        )
    return iter(iterable)
