"""Chunks of arrays: a rerun uses those that this program wrote for the same settings and refuses all others."""

import shutil

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.run_dir import ChunkStore, RunDir


def fill(directory):
    """Computes three chunks, and returns (numbers of the computed chunks, all values)."""
    made, store = [], ChunkStore(RunDir(directory), exclusive=False)

    def compute(i):
        made.append(i)
        return {"x": np.arange(2.0) + 2 * i, "count": np.int32(i)}

    num_chunks = store.fill("Computing", 6, 2, compute)
    loaded = [store.load(i) for i in range(num_chunks)]
    assert all(chunk.keys() == {"x", "count"} for chunk in loaded)
    return made, np.concatenate([chunk["x"] for chunk in loaded]).tolist()


def change(path, **arrays):
    with np.load(path) as stored:
        content = dict(stored)
    np.savez(path, **content | arrays)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def test_stored_chunks_are_used_and_counted(tmp_path, capsys):
    directory = tmp_path / "chunks"
    assert fill(directory) == ([0, 1, 2], [*range(6)]) and "continuing" not in capsys.readouterr().out
    (directory / "1.npz").unlink()
    (directory / "2.partial.npz").write_bytes(b"killed while writing")
    assert fill(directory) == ([1], [*range(6)])
    assert f"Computing: continuing from 2 of 3 batches, stored in {directory}.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: change(path, x=np.zeros(2)),
        lambda path: change(path, x=np.arange(2, 4)),  # equal values of another dtype
        lambda path: change(path, x=np.arange(2.0, 4).reshape(2, 1)),
        lambda path: change(path, y=np.zeros(2)),
        lambda path: change(path, digest=np.array("")),
        lambda path: shutil.copy(path.with_name("0.npz"), path),
        lambda path: shutil.copy(path.parents[1] / "other" / "1.npz", path),
        lambda path: path.write_bytes(b"PK\x03\x04 torn"),
        replace_by_folder,
    ],
)
def test_a_chunk_that_was_changed_or_copied_is_refused(damage, tmp_path):
    directory = tmp_path / "chunks"
    fill(directory)
    fill(tmp_path / "other")
    path = directory / "1.npz"
    damage(path)
    with pytest.raises(UserError, match=rf"^{path} was changed or copied .*: rm {path}$"):
        fill(directory)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert fill(directory) == ([1], [*range(6)])


def test_a_chunk_of_version_0_3_is_computed_again(tmp_path, capsys):
    directory = tmp_path / "chunks"
    fill(directory)
    np.savez(directory / "0.npz", x=np.ones(2))
    assert fill(directory) == ([0], [*range(6)])
    assert "; 1 without a digest are computed again." in capsys.readouterr().out
