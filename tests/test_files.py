"""Files and directories that are written completely or not at all."""

import pytest

from diffusion_jax.files import atomic_directory


def test_a_directory_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "out"
    with atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["out"] and (path / "a.txt").read_text() == "a"


def test_a_failed_directory_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("a")
        raise OSError("full")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())
