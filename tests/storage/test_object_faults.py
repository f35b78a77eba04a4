"""Objects while requests fail: each fault is retried, a lost answer is resolved, and what does not end is one line."""

import asyncio
import types

import aiohttp
import pytest

from diffusion_jax.errors import StorageError
from diffusion_jax.storage import objects, s3


@pytest.fixture
def store(bucket_url, proxy, scheme, monkeypatch):
    """A store whose client waits less between its attempts."""
    if scheme == "gs":
        hurried = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
        monkeypatch.setattr("gcsfs.retry.asyncio", hurried)
    monkeypatch.setattr(objects, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    opened = objects.open_store(f"{bucket_url}/run")
    opened.write("there", b"there")
    return opened


def use_everything(store, tmp_path):
    """Calls every method, and checks what it does."""
    store.write("a", b"1")
    assert store.read("a") == b"1" and store.find("a").size == 1 and sorted(store.list()) == ["a", "there"]
    tag = store.replace("b", b"2", "")
    assert tag and store.replace("b", b"3", "") is None
    new = store.replace("b", b"4", tag)
    assert new and store.replace("b", b"5", tag) is None
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


@pytest.mark.parametrize("fault", ["refuse", "lose"])
def test_a_lost_answer_of_a_conditional_write_is_resolved(store, proxy, fault):
    """The retry of a write that succeeded finds the object in its way: it is this write's own."""
    proxy.inject(fault, "write")
    tag = store.replace("x", b"token 1", "")
    assert tag == store.find("x").tag and store.read("x") == b"token 1"
    proxy.inject(fault, "write")
    new = store.replace("x", b"token 2", tag)
    assert new == store.find("x").tag != tag and store.read("x") == b"token 2"
    assert proxy.injected[fault] == 2
    proxy.inject(fault, "write")
    assert store.replace("x", b"token 3", "") is None and store.replace("x", b"token 4", tag) is None
    assert store.read("x") == b"token 2"


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


def test_a_refusal_is_not_retried(store, proxy):
    before = proxy.counts["write"]
    proxy.inject("refuse", "write", status=403, times=1e9)
    with pytest.raises(PermissionError, match=f"{store.url}/x: ") as caught:
        store.write("x", b"1")
    assert proxy.counts["write"] == before + 1 and "\n" not in str(caught.value)


@pytest.mark.whole
def test_the_clients_stop_waiting_for_an_answer(store, proxy, scheme, monkeypatch):
    if scheme == "gs":
        monkeypatch.setattr("diffusion_jax.storage.gcs._TIMEOUTS", aiohttp.ClientTimeout(sock_read=0.5))
    else:
        monkeypatch.setitem(s3._OPTIONS, "read_timeout", 0.5)
    store = objects.open_store(store.url)
    store.write("x", b"1")
    for kind in ("read", "write", "find"):
        proxy.inject("silence", kind)
    assert store.read("x") == b"1" and store.find("x").size == 1
    store.write("x", b"2")
    assert proxy.injected["silence"] == 3


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
