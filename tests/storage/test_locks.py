"""Locks on files and leases in buckets, with tenths of seconds instead of tens: exclusion, takeover, faults."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from diffusion_jax import run_dir
from diffusion_jax.errors import LeaseLostError, UserError
from diffusion_jax.run_dir import BucketRunDir, RunDir
from diffusion_jax.storage import locks, objects
from diffusion_jax.storage.locks import LockHeldError
from helpers.paths import ROOT

HERE = f"process {os.getpid()} of "


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    set_times(monkeypatch)


def set_times(monkeypatch, renew=0.1, wait=1.0):
    monkeypatch.setattr(locks, "_RENEW_SECONDS", renew)
    monkeypatch.setattr(locks, "_WAIT_SECONDS", wait)
    monkeypatch.setattr(locks, "_COUNTDOWN_SECONDS", wait / 3)


@pytest.fixture
def scheme():
    """One service, because `test_objects` tests the conditional writes of both."""
    return "gs"


@pytest.fixture
def workdir(bucket_url):
    return BucketRunDir(f"{bucket_url}/run")


def hold(workdir):
    return workdir.locked("is training")


def lease_of(workdir):
    """The lease held by `hold`."""
    return workdir._locks[-1]


def stored(workdir):
    return json.loads(workdir.store.read(".lock"))


def abandon(workdir):
    """Leaves a lease as a process that was killed on another machine."""
    lease = {"holder": "process 7 of there", "token": "x", "count": 1}
    workdir.store.write(".lock", json.dumps(lease).encode())


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_launch_is_refused_while_the_first_renews(workdir, capfd):
    assert workdir.find_holder() is None
    with hold(workdir):
        assert workdir.find_holder().startswith(HERE) and "last renewed at 20" in workdir.find_holder()
        with pytest.raises(LockHeldError, match=f"^{HERE}.* is training: a second launch must wait until it ends"):
            hold(BucketRunDir(str(workdir))).__enter__()
        out = capfd.readouterr().out
        assert f"Note: {HERE}" in out and "waiting 1 s" in out and "Note: 0 s left." in out
        count = stored(workdir)["count"]
        wait_for(lambda: stored(workdir)["count"] > count + 1)
    assert workdir.find_holder() is None
    with pytest.raises(ZeroDivisionError), hold(workdir):
        raise ZeroDivisionError
    with hold(workdir):
        pass
    assert not capfd.readouterr().out  # it was free


def test_an_abandoned_lease_is_taken_over_after_its_time(workdir, capfd):
    abandon(workdir)
    assert workdir.find_holder().startswith("process 7 of there (lease last renewed")
    with hold(workdir):
        assert workdir.find_holder().startswith(HERE)
    assert "Note: process 7 of there (lease last renewed at " in capfd.readouterr().out
    workdir.store.write(".lock", b"no lease")
    assert workdir.find_holder().startswith("another process")
    with hold(workdir):
        pass


@pytest.mark.parametrize("change", [lambda store: store.write(".lock", b"{}"), lambda store: store.delete([".lock"])])
def test_a_lease_that_is_released_meanwhile_is_taken_at_once(workdir, monkeypatch, change):
    set_times(monkeypatch, wait=30)
    abandon(workdir)
    threading.Timer(0.2, change, [workdir.store]).start()
    start = time.monotonic()
    with hold(workdir):
        assert workdir.find_holder().startswith(HERE) and time.monotonic() - start < 10


def test_one_of_many_launches_gets_the_lease(workdir):
    abandon(workdir)
    leases = [locks.Lease(workdir.store, ".lock") for _ in range(8)]
    holders = []
    threads = [threading.Thread(target=lambda lease=lease: holders.append(lease.acquire())) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert holders.count(None) == 1 and len(holders) == 8
    for lease in leases:
        lease.release()


def test_a_holder_notices_that_it_was_replaced(workdir, monkeypatch):
    set_times(monkeypatch, renew=60)  # the holder does not renew the lease
    message = f"^{HERE}.* has taken over .*this launch must stop"
    with pytest.raises(LeaseLostError, match=message) as at_the_end, hold(workdir):
        other = BucketRunDir(str(workdir))
        with hold(other):
            for _ in range(2):
                with pytest.raises(LeaseLostError, match=message):
                    lease_of(workdir).check()
            lease_of(other).check()
            with pytest.raises(LeaseLostError):
                workdir.subdirectory("checkpoints").check_locks()
    assert at_the_end.value.exit_code == 2 and "\n" not in str(at_the_end.value)
    assert workdir.find_holder() is None


def test_the_end_of_a_launch_leaves_the_lease_of_another(workdir, monkeypatch):
    set_times(monkeypatch, renew=60)
    with pytest.raises(LeaseLostError), hold(workdir):
        abandon(workdir)
    assert workdir.find_holder().startswith("process 7 of there")


def test_a_deleted_lease_is_lost_and_reported_once(workdir, capfd):
    with pytest.raises(LeaseLostError, match="another launch has taken over"), hold(workdir):
        lease = lease_of(workdir)
        workdir.store.delete([".lock"])
        wait_for(lambda: not lease._thread.is_alive())
        assert capfd.readouterr().out.count("Warning: ") == 1


@pytest.mark.whole
def test_a_lease_survives_faults(workdir, proxy):
    """The answer to the first write is lost; renewals are refused, lost, unanswered and late; the holder keeps the lease."""
    lease = locks.Lease(objects.open_store(str(workdir)), ".lock")  # which passes the proxy
    proxy.inject("lose", "write")
    assert lease.acquire() is None and proxy.injected["lose"] == 1
    for fault in ("refuse", "lose", "cut", "silence", "delay"):
        injected = proxy.injected[fault]
        proxy.inject(fault, "write", times=2, seconds=1)
        wait_for(lambda fault=fault, injected=injected: proxy.injected[fault] == injected + 2)
        lease.check()
    lease.release()
    assert workdir.find_holder() is None


def test_process_0_alone_holds_the_lease(workdir, monkeypatch):
    monkeypatch.setattr(run_dir, "broadcast_from_process_0", lambda function: None)  # as process 1 sees it
    with hold(workdir):
        assert not workdir.store.list()
    monkeypatch.setattr(run_dir, "broadcast_from_process_0", lambda function: "process 1 of there")
    with pytest.raises(LockHeldError, match="process 1 of there is training"):
        hold(workdir).__enter__()


HOLDER = """
import sys, time
from diffusion_jax.run_dir import RunDir
with RunDir(sys.argv[1]).locked("is training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.whole
def test_a_file_is_locked_until_its_process_ends(tmp_path, capfd):
    workdir, path = RunDir(tmp_path), tmp_path / ".lock"
    assert workdir.find_holder() is None and not path.exists()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        name = f"process {holder.pid} of "
        assert workdir.find_holder().startswith(name)
        start = time.monotonic()
        with pytest.raises(LockHeldError, match=f"^{name}.* is training: a second launch must wait until it ends"):
            hold(workdir).__enter__()
        assert time.monotonic() - start >= 1
        out = capfd.readouterr().out
        assert f"Note: {name}" in out and f"holds {path}; waiting 1 s." in out
        assert 1 <= out.count(" s left.") <= 3  # one request in a third of a second, not one in each try
        threading.Timer(0.3, holder.kill).start()
        with hold(RunDir(tmp_path)):  # waits for the end
            assert path.read_text().startswith(HERE)
    assert workdir.find_holder() is None


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "hard link", "socket"])
def test_a_lock_that_is_no_file_of_its_own_is_refused(kind, tmp_path, monkeypatch):
    """A launch that went on would have no lock, wait forever, or write its name into another file."""
    path, other = tmp_path / ".lock", tmp_path / "other"
    other.write_text("kept")
    if kind in ("link", "dangling"):
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(".lock")
    else:
        {"folder": os.mkdir, "pipe": os.mkfifo, "hard link": lambda path: os.link(other, path)}[kind](path)
    with pytest.raises(UserError, match=r"\.lock is .*type: (rm|cp)"):
        hold(RunDir(tmp_path)).__enter__()
    assert other.read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """Not a file system without locks, which is a note."""
    monkeypatch.setattr(locks.pathlib.Path, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=PermissionError(1, "Operation not permitted")))
    with pytest.raises(PermissionError, match="denied"):
        hold(RunDir(tmp_path)).__enter__()


def test_a_directory_without_locks_is_used_with_a_note(tmp_path, monkeypatch, capfd):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with hold(RunDir(tmp_path)):
        assert "does not support locks" in capfd.readouterr().out
