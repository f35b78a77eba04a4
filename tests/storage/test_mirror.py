"""Local mirrors of work directories in buckets: fetched, uploaded and deleted files."""

import os
import stat

import numpy as np
import pytest

from diffusion_jax import files, run_dir
from diffusion_jax.errors import StorageError, UserError
from diffusion_jax.run_dir import BucketRunDir, ChunkStore, committed_steps, open_run_dir
from diffusion_jax.storage.downloads import is_safe, local_path
from diffusion_jax.storage.objects import open_store

pytestmark = pytest.mark.parametrize("scheme", ["gs"])  # the services differ below ObjectStore only


@pytest.fixture
def url(bucket_url):
    return f"{bucket_url}/runs/one"


@pytest.fixture
def store(url):
    return open_store(url)


def test_finished_files_are_uploaded_and_partial_ones_are_not(url, store):
    workdir = BucketRunDir(url)
    files.write_text(workdir / "config.json", "{}")
    (workdir / "samples").mkdir()
    files.save_npz(workdir / "samples" / "a.npz", {"arr_0": np.arange(3)})
    assert not store.list()
    with pytest.raises(RuntimeError), files.atomic_write(workdir / "broken.txt") as file:
        file.write(b"half")
        raise RuntimeError
    (workdir / "plugins" / "trace").mkdir(parents=True)
    (workdir / "plugins" / "trace" / "events").write_bytes(b"w")
    workdir.upload(workdir / "config.json", *(workdir / name for name in ("samples", "plugins", "broken.txt")))
    assert sorted(store.list()) == ["config.json", "plugins/trace/events", "samples/a.npz"]
    assert store.read("config.json") == b"{}"
    assert str(workdir) == url and str(workdir.subdirectory("samples")) == f"{url}/samples"
    assert files.with_urls(f"Written: {workdir / 'config.json'}.") == f"Written: {url}/config.json."


def test_a_mirror_holds_the_small_files_and_committed_steps_only(url, store):
    for name in ("config.json", "metrics/00000010.jsonl", "samples/a.png", "events.out.tfevents.1.host.00000010"):
        store.write(name, name.encode())
    for step, names in ((10, ("_CHECKPOINT_METADATA", "params/d/0", "digests.json")), (20, ("_CHECKPOINT_METADATA",))):
        for name in names:
            store.write(f"checkpoints/{step}/{name}", b"{}")
    workdir = BucketRunDir(url)

    def found():
        return {path.relative_to(workdir).as_posix() for path in workdir.path.rglob("*") if path.is_file()}

    small = {"config.json", "metrics/00000010.jsonl"}
    small |= {"checkpoints/10/_CHECKPOINT_METADATA", "checkpoints/10/digests.json"}
    assert found() == small and committed_steps(workdir / "checkpoints") == [10]
    workdir.fetch(workdir / "checkpoints" / "10" / "params")
    workdir.fetch(workdir / "samples")
    assert found() == small | {"checkpoints/10/params/d/0", "samples/a.png"}


def test_refresh_follows_the_bucket(url, store):
    store.write("a", b"1")
    store.write("b", b"1")
    workdir = BucketRunDir(url)
    store.write("a", b"2")
    store.delete(["b"])
    store.write("c", b"1")
    workdir.refresh()
    assert {path.name: path.read_bytes() for path in workdir.path.iterdir()} == {"a": b"2", "c": b"1"}


def test_an_object_that_vanishes_after_it_was_listed_is_not_missed(url, store, monkeypatch):
    store.write("a", b"1")
    store.write("b", b"1")
    workdir = BucketRunDir(url)
    store.write("a", b"2")
    store.write("b", b"2")
    download = workdir.store.download

    def download_after_deletion(name, path):
        store.delete(["b"])
        download(name, path)

    monkeypatch.setattr(workdir.store, "download", download_after_deletion)
    workdir.refresh()
    assert {path.name: path.read_bytes() for path in workdir.path.iterdir()} == {"a": b"2"}


def test_a_reader_uploads_nothing_and_keeps_its_copy(url, store, own_cache):
    store.write("config.json", b"{}")
    workdir = BucketRunDir(url, read_only=True)
    for change in (workdir.upload, workdir.delete, lambda path: workdir.rename(path, "other")):
        (workdir / "folder").mkdir(exist_ok=True)
        with pytest.raises(PermissionError, match="open for reading only"):
            change(workdir / "folder")
    assert list(store.list()) == ["config.json"]
    assert open_run_dir(url, read_only=True).path == workdir.path == open_run_dir(workdir.path).path
    assert open_run_dir(workdir) is workdir and local_path(url) == workdir.path


def test_the_directory_of_a_killed_process_is_removed(url, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, parent = BucketRunDir(url), files.mirrors_root()
    dead = parent / f"mirror.{'a' * 8}"
    for path in (dead, parent / "run", parent / "mirror.long_name_", tmp_path / "elsewhere"):
        path.mkdir()
        (path / ".lock").touch()
    (parent / f"mirror.{'b' * 8}").symlink_to(tmp_path / "elsewhere")
    second = BucketRunDir(url)
    # A live process's lock is respected between processes; this process cannot refuse itself.
    assert second.path.exists() and first.path != second.path
    assert not dead.exists()
    assert all(
        (path / ".lock").exists() for path in (parent / "run", parent / "mirror.long_name_", tmp_path / "elsewhere")
    )
    assert stat.S_IMODE(parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("problem", ["link", "dangling", "open to others", "another user", "file"])
def test_mirrors_are_in_a_private_directory(problem, url, tmp_path, monkeypatch):
    """Otherwise somebody else decides which directories are deleted."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parent, runs = files.mirrors_root(), tmp_path / "runs"
    lock = runs / f"mirror.{'a' * 8}" / ".lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    runs.chmod(0o770 if problem == "open to others" else 0o700)
    if problem in ("link", "dangling"):
        parent.symlink_to(runs if problem == "link" else tmp_path / "nowhere")
    elif problem == "file":
        parent.touch()
    else:
        runs.rename(parent)
        lock = parent / lock.relative_to(runs)
    if problem == "another user":
        monkeypatch.setattr("os.getuid", lambda: parent.stat().st_uid + 1)
        monkeypatch.setattr(run_dir, "mirrors_root", lambda: parent)
    with pytest.raises(
        StorageError, match=r"must be a directory, no link, that only you can use .*type: (rm|chmod 700) .*set TMPDIR"
    ):
        BucketRunDir(url)
    assert lock.exists() and not (tmp_path / "nowhere").exists()


def test_another_machine_continues_after_finished_chunks(url, store):
    chunks = ChunkStore(BucketRunDir(url).subdirectory("samples/.chunks"))
    chunks.save(3, images=np.arange(4))
    assert "samples/.chunks/3.npz" in store.list()
    workdir = BucketRunDir(url)
    with np.load(workdir.fetch(workdir / "samples" / ".chunks" / "3.npz")) as arrays:
        np.testing.assert_array_equal(arrays["images"], np.arange(4))
    chunks.delete()
    assert not store.list("samples/")


def test_files_and_folders_are_downloaded_once(bucket_url, own_cache, capsys):
    store = open_store(bucket_url)
    store.write("data/train/a.npy", b"1" * 1_000_001)
    store.write("data/train/b.npy", b"2")
    store.write("data/test/c.npy", b"3")
    store.write("weights.npz", b"w")
    assert local_path(f"{bucket_url}/weights.npz").read_bytes() == b"w"
    folder = local_path(f"{bucket_url}/data/", below="train/")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npy")) == ["train/a.npy", "train/b.npy"]
    assert "2 files" in capsys.readouterr().out
    assert local_path(f"{bucket_url}/data", below="train/") == folder and not capsys.readouterr().out

    store.write("data/train/a.npy", b"changed")
    store.delete(["data/train/b.npy"])
    local_path(f"{bucket_url}/data")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npy")) == ["test/c.npy", "train/a.npy"]
    assert (folder / "train" / "a.npy").read_bytes() == b"changed"
    assert files.with_urls(f"{folder}/test") == f"{bucket_url}/data/test"
    assert not local_path(f"{bucket_url}/nothing").exists()


def test_names_that_leave_the_mirror_and_whole_buckets_are_refused(bucket_url):
    assert is_safe("a/b") and not any(map(is_safe, ("../a", "a/../../b", "/a", "a\\..\\b")))
    with pytest.raises(StorageError, match="is a whole bucket"):
        local_path(f"{bucket_url}/")


def test_a_disk_that_is_too_small_is_named(bucket_url, own_cache, monkeypatch):
    open_store(bucket_url).write("weights.npz", b"w" * 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result and type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a directory on a larger disk"):
        local_path(f"{bucket_url}/weights.npz")
