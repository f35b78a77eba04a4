"""Objects while requests fail: each fault is retried, a lost answer is resolved, and what does not end is one line."""

import os

import pytest

from diffusion_jax.errors import StorageError
from diffusion_jax.storage import objects
from helpers.fault_proxy import MUTATING


@pytest.fixture
def store(bucket_url, proxy):
    opened = objects.open_store(f"{bucket_url}/run")
    opened.write("there", b"there")
    return opened.with_limits(60, attempt_seconds=5)


def use_everything(store, tmp_path):
    """Calls every method, and checks what it does."""
    store.write("a", b"1")
    assert store.read("a") == b"1" and store.find("a").size == 1 and sorted(store.list()) == ["a", "there"]
    tag = store.create("b", b"2")
    assert tag and store.create("b", b"3") is None
    new = store.replace("b", b"4", tag)
    assert new and store.replace("b", b"5", tag) is None
    (tmp_path / "up").write_bytes(b"6" * 100_000)
    store.upload(tmp_path / "up", "c")
    store.download("c", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"6" * 100_000
    store.move("c", "d")
    store.delete_version("b", tag if store.url.startswith("s3") else new)  # the emulator of GCS deletes every version
    store.delete_version("b", new)
    assert sorted(store.list()) == ["a", "d", "there"]
    store.delete(["a", "d"])
    assert sorted(store.list()) == ["there"]
    with pytest.raises(FileNotFoundError):
        store.read("a")


FAULTS = {
    "503": {"fault": "refuse", "status": 503},
    "429": {"fault": "refuse", "status": 429},
    "500": {"fault": "refuse", "status": 500},
    "no answer": {"fault": "silence", "seconds": 0.1},
    "cut": {"fault": "cut"},
    "lost answer": {"fault": "lose"},
    "truncated answer": {"fault": "truncate"},
    "slow": {"fault": "delay", "seconds": 0.1},
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAULTS)
def test_every_request_survives_a_fault(store, proxy, tmp_path, name):
    """Every second request fails."""
    proxy.inject(**FAULTS[name], every=2, times=float("inf"))
    use_everything(store, tmp_path)
    assert sum(proxy.injected.values()) >= 10


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(3))
def test_every_request_survives_random_faults(store, proxy, tmp_path, seed):
    proxy._random.seed(seed)
    for options in FAULTS.values():
        proxy.inject(**options, times=float("inf"), probability=0.06)
    use_everything(store, tmp_path)
    assert proxy.injected


@pytest.mark.parametrize("fault", ["refuse", "lose"])
def test_a_lost_answer_of_a_conditional_write_is_resolved(store, proxy, fault):
    """The retry of a write that succeeded finds the object in its way: it is this write's own."""
    proxy.inject(fault, "write")
    tag = store.create("x", b"token 1")
    assert tag == store.find("x").tag and store.read("x") == b"token 1"
    proxy.inject(fault, "write")
    new = store.replace("x", b"token 2", tag)
    assert new == store.find("x").tag != tag and store.read("x") == b"token 2"
    assert proxy.injected[fault] == 2
    proxy.inject(fault, "write")
    assert store.create("x", b"token 3") is None and store.replace("x", b"token 4", tag) is None
    assert store.read("x") == b"token 2"


def test_a_truncated_download_leaves_nothing(store, proxy, tmp_path):
    proxy.inject("truncate", "read", times=1e9)
    with pytest.raises(OSError, match=f"{store.url}/there: .*, tried for 0 s") as caught:
        store.with_limits(0.3).download("there", tmp_path / "x")
    assert not list(tmp_path.iterdir()) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("options", [{"fault": "refuse", "status": 503}, {"fault": "silence"}, {"fault": "lose"}])
def test_what_does_not_end_is_one_line(store, proxy, options):
    proxy.inject(**options, times=1e9)
    with pytest.raises(OSError, match=f"{store.url}/there: .*, tried for 0 s") as caught:
        store.with_limits(0.3, attempt_seconds=0.2).read("there")
    assert "\n" not in str(caught.value) and proxy.counts["read"] >= 2


def test_a_refusal_is_not_retried(store, proxy):
    before = proxy.counts["write"]
    proxy.inject("refuse", "write", status=403, times=1e9)
    with pytest.raises(PermissionError, match=f"{store.url}/x: ") as caught:
        store.write("x", b"1")
    assert proxy.counts["write"] == before + 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3"])  # which deletes many objects with one request
def test_a_deletion_that_the_service_reports_as_failed(store, proxy, scheme):
    body = "<DeleteResult><Error><Key>run/there</Key><Code>{}</Code><Message>no</Message></Error></DeleteResult>"
    proxy.inject("refuse", "delete", status=200, body=body.format("AccessDenied").encode())
    with pytest.raises(PermissionError, match=f"{store.url}: run/there was not deleted: no"):
        store.delete(["there"])
    proxy.inject("refuse", "delete", status=200, body=body.format("InternalError").encode())
    store.delete(["there"])
    assert store.list() == {} and proxy.injected == {"refuse": 2}


@pytest.mark.whole
def test_a_large_upload_survives_cut_connections(store, proxy, tmp_path):
    data = os.urandom(120 * 2**20)
    (tmp_path / "large").write_bytes(data)
    proxy.inject("cut", "write", every=2, times=3)
    store = store.with_limits(60)
    store.upload(tmp_path / "large", "large")
    proxy.inject("truncate", "read", times=2)
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data and proxy.injected == {"cut": 3, "truncate": 2}


@pytest.mark.whole
def test_the_clients_stop_waiting_for_an_answer(bucket_url, proxy, scheme, monkeypatch):
    """Without a limit on attempts."""
    monkeypatch.setattr(f"diffusion_jax.storage.{'gcs' if scheme == 'gs' else 's3'}.READ_TIMEOUT", 0.5)
    store = objects.open_store(bucket_url)
    store.write("x", b"1")
    for kind in ("read", "write", "find"):
        proxy.inject("silence", kind)
    assert store.read("x") == b"1" and store.find("x").size == 1
    store.write("x", b"2")
    assert proxy.injected["silence"] == 3


def test_nothing_is_cached(bucket_url, proxy):
    store, other = objects.open_store(bucket_url), objects.open_store(bucket_url)
    assert store.list() == {} and store.find("x") is None
    other.write("x", b"1")
    assert list(store.list()) == ["x"] and store.find("x").size == 1
    proxy.inject("stale", "list")
    assert store.list() == {}  # the proxy repeats what it first answered
    assert list(store.list()) == ["x"]


def test_a_callback_after_a_number_of_changes(store, proxy):
    """The tool of tests that kill a program at a chosen request."""
    calls = []
    proxy.call_after(2, lambda: calls.append(store.with_limits(1).find("y") is not None))
    store.write("x", b"1")
    assert not calls
    store.write("y", b"1")
    assert calls == [True] and proxy.counts["write"] >= 2 and "write" in MUTATING


@pytest.mark.whole
@pytest.mark.parametrize(
    ("options", "reason"), [({"fault": "silence"}, "no answer in time"), ({"fault": "refuse"}, "(503|no answer)")]
)
def test_a_service_that_does_not_answer_is_refused_in_time(bucket_url, proxy, monkeypatch, options, reason):
    monkeypatch.setattr(objects, "_OPEN_TIMEOUT", 2.0)  # instead of 10 seconds
    proxy.inject(**options, times=1e9)
    with pytest.raises(StorageError, match=f"{bucket_url}/run cannot be listed \\(.*{reason}.*the network") as caught:
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


def test_a_service_that_ignores_conditions_is_refused(bucket_url, proxy):
    objects.open_store(bucket_url, write=True)
    for skip in (1, 2):  # the first write has no condition
        proxy.inject("unconditional", "write", skip=skip)
        with pytest.raises(StorageError, match="the service ignores If-None-Match or If-Match"):
            objects.open_store(bucket_url, write=True)
        proxy.clear()
    assert objects.open_store(bucket_url).list() == {}


def test_invalid_credentials_are_named(bucket_url, proxy):
    proxy.inject("refuse", status=401, times=1e9)
    with pytest.raises(StorageError, match="no valid credentials .*; type: "):
        objects.open_store(f"{bucket_url}/run")
    assert proxy.counts == {"list": 1}
