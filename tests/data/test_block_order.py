"""The order of examples that are read in blocks: every example once in each epoch, few blocks for each process."""

import math

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import sources

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(20, 30, 40)]
N, BATCH = sum(LENGTHS), 16
LANES = 16
ENDS = np.cumsum(LENGTHS)


class Blocks:
    """Example i is the number i."""

    block_lengths = LENGTHS

    def __len__(self):
        return N

    def read(self, indices):
        return {"x": np.asarray(indices, np.float32)[:, None]}


def numbers(batch):
    return batch["x"][:, 0].astype(int)


def test_data_without_blocks_are_permuted_as_a_whole():
    """The order that runs of earlier versions have: NumPy's permutation by (seed, epoch)."""
    source = data.InMemory({"x": np.arange(N, dtype=np.float32)[:, None]})
    batches = data.Batches(source, 5, 3, N)
    got = np.concatenate([numbers(batches[step]) for step in range(N)])
    expected = [np.random.default_rng((5, epoch)).permutation(N) for epoch in range(3)]
    np.testing.assert_array_equal(got, np.concatenate(expected))


def test_the_order_does_not_depend_on_where_the_blocks_are_read():
    """A copy in memory, a derived source, and files without an example in the split have the order of the blocks."""
    with_empty = Blocks()
    with_empty.block_lengths = [0, *LENGTHS[:7], 0, *LENGTHS[7:]]
    expected = data.Batches(Blocks(), 1, BATCH, 10**6)
    for source in (data.InMemory.load(Blocks()), sources.DerivedSource(Blocks()), with_empty):
        batches = data.Batches(source, 1, BATCH, 10**6)
        assert batches.num_blocks == len(LENGTHS)
        for step in (0, 20):
            np.testing.assert_array_equal(numbers(batches[step]), numbers(expected[step]))
    selected = sources.SelectedExamples(Blocks(), np.arange(1, N, 2))
    batches = data.Batches(selected, 1, 1, 10**6)
    assert sorted(numbers(batches[step])[0] for step in range(N // 2)) == list(range(1, N, 2))


def test_each_row_reads_its_share_of_every_epoch_once():
    """With 20 lanes of two blocks there is room for 16 lanes, so a lane is one row of the batch of 16."""
    batches = data.Batches(Blocks(), 1, BATCH, 10**6)
    rows = [
        np.concatenate([batches.indices(step, np.array([row])) for step in range(3 * N // BATCH)]) for row in range(16)
    ]
    edges = np.arange(LANES + 1) * N // LANES
    epochs = []
    for epoch in range(2):
        sizes = np.diff(edges)
        read = [row[epoch * size : (epoch + 1) * size] for row, size in zip(rows, sizes, strict=True)]
        np.testing.assert_array_equal(np.sort(np.concatenate(read)), np.arange(N))
        epochs.append(np.concatenate(read))
    assert (epochs[0] != epochs[1]).mean() > 0.9
    other = data.Batches(Blocks(), 2, BATCH, 10**6)
    assert (numbers(other[0]) != numbers(batches[0])).any()


def test_a_process_reads_few_blocks_at_a_time_and_other_blocks_than_its_peers():
    whole = data.Batches(Blocks(), 1, BATCH, 10**6)
    halves = [data.Batches(Blocks(), 1, BATCH, 10**6, rows) for rows in (slice(0, 8), slice(8, 16))]
    blocks = [set(), set()]
    for step in range(N // BATCH):
        for half, seen in zip(halves, blocks, strict=True):
            seen.update(np.searchsorted(ENDS, numbers(half[step]), "right").tolist())
        np.testing.assert_array_equal(numbers(whole[step]), np.concatenate([numbers(half[step]) for half in halves]))
    assert len(blocks[0] & blocks[1]) <= 2  # a block on the boundary; lanes drift by less than an example in an epoch
    # At each step a lane is within one window: two blocks, and two neighbors that its edges cut.
    row = np.array([whole.indices(step, np.array([3]))[0] for step in range(20)])
    assert len(np.unique(np.searchsorted(ENDS, row, "right"))) <= 6


def test_examples_are_mixed_within_a_window():
    """Consecutive examples of a row are not neighbors in the file."""
    batches = data.Batches(Blocks(), 1, BATCH, 10**6)
    row = np.concatenate([batches.indices(step, np.array([5])) for step in range(30)])
    assert (np.abs(np.diff(row)) == 1).mean() < 0.2


@pytest.mark.parametrize("batch_size", [1, 3, 24, 64])
def test_any_batch_size_reads_every_example(batch_size):
    batches = data.Batches(Blocks(), 1, batch_size, 10**6)
    lanes = math.gcd(batch_size, 16)
    steps = math.ceil(math.ceil(N / lanes) / (batch_size // lanes))
    seen = np.concatenate([numbers(batches[step]) for step in range(steps)])
    assert len(np.unique(seen)) == N


def test_block_lengths_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(Blocks, "block_lengths", [3, 4])
    config = {"dataset": "blocks", "image_size": (), "channels": 1, "levels": None}
    with pytest.raises(data.DataError, match=f"add up to 7, but it has {N} examples"):
        sources.check_examples(config | {"random_flip": False}, Blocks())


@pytest.mark.whole
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("source", [Blocks(), data.InMemory({"x": np.arange(N)[:, None]})], ids=["blocks", "memory"])
def test_a_stream_starts_at_any_step_and_workers_share_its_rows(source, workers):
    batches = data.Batches(source, 3, BATCH, 40)
    got = list(data.stream(batches, start=5, workers=workers))
    assert len(got) == 35
    for step, batch in enumerate(got, 5):
        np.testing.assert_array_equal(batch["x"], batches[step]["x"])
