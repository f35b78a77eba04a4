"""Objects while requests fail: each fault is retried, and a fault that does not end is one line."""

import asyncio
import types

import pytest

from diffusion_jax.errors import StorageError
from diffusion_jax.storage import objects, s3


@pytest.fixture
def store(bucket_url, proxy, scheme, monkeypatch):
    """A store whose client waits less between attempts."""
    hurried = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
    monkeypatch.setattr({"gs": "gcsfs.retry", "s3": "aiobotocore.endpoint"}[scheme] + ".asyncio", hurried)
    monkeypatch.setattr(objects, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    opened = objects.open_store(f"{bucket_url}/run")
    opened.write("there", b"there")
    return opened


def use_everything(store, tmp_path):
    """Calls every method, and checks the effect."""
    store.write("a", b"1")
    assert store.read("a") == b"1" and store.find("a").size == 1 and sorted(store.list()) == ["a", "there"]
    tag = (
        store.replace("b", b"2", "") or store.find("b").tag
    )  # None: the answer was lost, and the retry found the object
    assert store.replace("b", b"3", "") is None
    new = store.replace("b", b"4", tag) or store.find("b").tag
    assert new != tag and store.replace("b", b"5", tag) is None and store.read("b") == b"4"
    (tmp_path / "up").write_bytes(b"6" * 100_000)
    store.upload(tmp_path / "up", "c")
    store.download("c", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"6" * 100_000
    store.move("c", "d")
    assert sorted(store.list()) == ["a", "b", "d", "there"]
    store.delete(["a", "b", "d"])
    assert sorted(store.list()) == ["there"]
    with pytest.raises(FileNotFoundError):
        store.read("a")


FAULTS = {
    "503": {"fault": "refuse", "status": 503},
    "429": {"fault": "refuse", "status": 429},
    "no answer": {"fault": "silence", "seconds": 0.1},
    "cut": {"fault": "cut"},
    "lost answer": {"fault": "lose"},
    "truncated answer": {"fault": "truncate"},
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAULTS)
def test_every_request_survives_a_fault(store, proxy, tmp_path, name):
    """Every second request fails."""
    proxy.inject(**FAULTS[name], every=2, times=float("inf"))
    use_everything(store, tmp_path)
    assert sum(proxy.injected.values()) >= 10


@pytest.mark.whole
def test_a_truncated_download_leaves_nothing(store, proxy, scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    if scheme == "s3":
        monkeypatch.setitem(s3._OPTIONS, "retries", {"max_attempts": 1})
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    proxy.inject("truncate", "read", times=1e9)
    with pytest.raises(OSError, match=f"{store.url}/there: ") as caught:
        objects.open_store(store.url).download("there", tmp_path / "x")
    assert not list(tmp_path.iterdir()) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.whole
def test_a_service_that_does_not_answer_is_refused_in_time(bucket_url, proxy, monkeypatch):
    monkeypatch.setattr(objects, "_OPEN_TIMEOUT", 2.0)  # instead of 15 seconds
    proxy.inject("silence", times=1e9)
    with pytest.raises(StorageError, match=f"{bucket_url}/run cannot be listed \\(.*the network") as caught:
        objects.open_store(f"{bucket_url}/run")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_cannot_be_written_is_refused(bucket_url, proxy):
    proxy.inject("refuse", "write", status=403, times=1e9)
    assert objects.open_store(f"{bucket_url}/run").list() == {}
    with pytest.raises(StorageError, match=f"{bucket_url}/run cannot be written to: permission denied") as caught:
        objects.open_store(f"{bucket_url}/run", write=True)
    assert "\n" not in str(caught.value)
    proxy.clear()
    objects.open_store(f"{bucket_url}/run", write=True)
    assert objects.open_store(bucket_url).list() == {}
    proxy.inject("refuse", "list", status=403, times=1e9)
    with pytest.raises(StorageError, match="cannot be listed: permission denied"):
        objects.open_store(f"{bucket_url}/run")


def test_a_service_that_ignores_conditions_is_refused(store, proxy):
    for skip in (0, 1):
        proxy.inject("unconditional", "write", skip=skip)
        with pytest.raises(StorageError, match="the service ignores If-None-Match or If-Match"):
            store.check_conditions("there")
        proxy.clear()
        store.write("there", b"there")
    store.check_conditions("there")
    assert store.read("there") == b"there"


def test_invalid_credentials_are_named(bucket_url, proxy):
    proxy.inject("refuse", status=401, times=1e9)
    with pytest.raises(StorageError, match="no valid credentials .*; type: "):
        objects.open_store(f"{bucket_url}/run")
    assert proxy.counts == {"list": 1}
