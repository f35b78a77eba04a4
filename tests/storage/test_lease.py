"""Leases on both services, with tenths of seconds instead of tens: exclusion, takeover, faults."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffusion_jax.distributed.file_lock import LockHeldError
from diffusion_jax.errors import LeaseLostError
from diffusion_jax.storage import lease, objects
from helpers.paths import ROOT

RENEW, LAST = 0.1, 1.0  # seconds


@pytest.fixture
def store(bucket_url):
    return objects.open_store(f"{bucket_url}/run")


def hold(store, renew=RENEW, last=LAST):
    return lease.leased(store, ".lock", f"is training in {store.url}", renew, last)


def abandon(store, **changes):
    """Leaves the lease of a process that was killed on another machine."""
    holder = dataclasses.replace(lease._Holder.this_process(), host="there", pid=7, pid_space="x", **changes)
    store.write(".lock", holder.to_bytes())


def counter(store):
    return json.loads(store.read(".lock"))["counter"]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_launch_is_refused_while_the_first_renews(store, capfd):
    assert lease.find_holder(store, ".lock") is None
    with hold(store) as held:
        name = f"process {os.getpid()} of "
        assert lease.find_holder(store, ".lock").startswith(name) and "last renewed at 20" in lease.find_holder(
            store, ".lock"
        )
        with pytest.raises(
            LockHeldError, match=f"^{name}.* is training in {store.url}: a second launch must wait until it"
        ):
            with hold(store, last=6):
                pass
        assert f"Note: {name}" in capfd.readouterr().out
        held.check()
        count = counter(store)
        wait_for(lambda: counter(store) > count + 1)
    assert store.list() == {} and lease.find_holder(store, ".lock") is None
    with pytest.raises(ZeroDivisionError):
        with hold(store):
            raise ZeroDivisionError
    assert store.list() == {}
    with hold(store):
        pass


def test_an_abandoned_lease_is_taken_over_after_its_time(store, capfd):
    abandon(store)
    assert lease.find_holder(store, ".lock").startswith("process 7 of there (lease last renewed")
    with hold(store, last=0.5) as held:
        held.check()
    out = capfd.readouterr().out
    assert (
        out.count("\n") == 1 and "process 7 of there holds" in out and "waiting 0.5 s to see whether it is alive" in out
    )
    store.write(".lock", b"no lease")
    assert lease.find_holder(store, ".lock").startswith("another process")
    with hold(store, last=0.5):
        pass
    assert "another process holds" in capfd.readouterr().out


def test_a_lease_that_is_released_meanwhile_is_created_anew(store):
    abandon(store)
    threading.Timer(0.2, store.delete, [[".lock"]]).start()
    with hold(store, last=6):
        assert f"process {os.getpid()} of " in lease.find_holder(store, ".lock")


def test_the_watch_ends_with_a_change(store):
    abandon(store)
    tag = store.find(".lock").tag
    watcher = lease.Lease(store, ".lock", 1, lease_seconds=0.1)
    assert watcher._is_unchanged(tag)
    abandon(store, counter=1)
    assert not watcher._is_unchanged(tag)
    store.delete([".lock"])
    assert not watcher._is_unchanged(tag)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems wait for the time of the lease")
def test_the_lease_of_a_process_that_has_ended_here_is_taken_over_at_once(store, capfd):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.write(".lock", dataclasses.replace(lease._Holder.this_process(), pid=ended.pid).to_bytes())
    with hold(store, last=60):
        pass
    assert capfd.readouterr().out == ""
    for changes in ({"host": "there"}, {"pid_space": "another container"}, {"pid_space": ""}, {"pid": os.getpid()}):
        holder = dataclasses.replace(lease._Holder.this_process(), **{"pid": ended.pid} | changes)
        assert not holder.has_ended()


@pytest.mark.whole
def test_one_of_many_takeovers_succeeds(store):
    abandon(store)
    barrier, held = threading.Barrier(20), []

    def launch(_):
        barrier.wait()
        try:
            with hold(store, last=0.5) as mine:
                held.append(mine)
                wait_for(lambda: len(refused) == 19)
                mine.check()
        except LockHeldError as error:
            refused.append(str(error))

    refused = []
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(launch, range(20)))
    assert len(held) == 1 and len(refused) == 19 and store.list() == {}


def test_the_first_launch_stops_when_another_has_taken_over(store, capfd):
    with hold(store, renew=60) as held:
        held.check()
        with hold(store, last=0.3) as second:  # the first does not renew
            with pytest.raises(LeaseLostError, match="process .* has taken over .*this launch must stop") as caught:
                held.check()
            assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
            with pytest.raises(LeaseLostError):
                held.check()
            second.check()
    abandon(store)
    assert lease.find_holder(store, ".lock").startswith("process 7 of there")


def test_the_end_of_a_launch_leaves_the_lease_of_another(store):
    with hold(store, renew=60):
        abandon(store)
    assert lease.find_holder(store, ".lock").startswith("process 7 of there")


def test_a_deleted_lease_is_lost_and_said_once(store, capfd):
    with hold(store) as held:
        store.delete([".lock"])
        wait_for(lambda: not held._thread.is_alive())
        with pytest.raises(LeaseLostError, match=r"\.lock was deleted, so another launch may write there"):
            held.check()
        assert capfd.readouterr().out.count("Warning: ") == 1
    assert store.list() == {}


@pytest.mark.whole
def test_a_lease_survives_faults(store, proxy):
    """Renewals are refused, lost, unanswered and late; the holder notices nothing."""
    store = objects.open_store(store.url)
    with hold(store, renew=0.2) as held:
        for fault in ("refuse", "lose", "cut", "silence", "delay"):
            injected = proxy.injected[fault]
            proxy.inject(fault, "write", times=2, seconds=1)
            wait_for(lambda fault=fault, injected=injected: proxy.injected[fault] == injected + 2)
            held.check()
        proxy.inject("refuse", times=1e9)  # an outage, longer than a renewal is tried
        time.sleep(0.6)
        proxy.clear()
        held.check()
    assert store.list() == {}


def test_a_lost_takeover_is_found(store, proxy):
    store = objects.open_store(store.url)
    abandon(store)
    proxy.inject("lose", "write")
    with hold(store, last=0.3) as held:
        held.check()
    proxy.inject("lose", "write")
    with hold(store) as held:
        held.check()
    assert proxy.injected["lose"] == 2 and store.list() == {}


def test_an_end_without_network_leaves_the_lease_to_expire(store, proxy):
    store = objects.open_store(store.url)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(store))
        proxy.inject("refuse", times=1e9)
    proxy.clear()
    assert ".lock" in store.list()


def test_process_0_alone_holds_the_lease(store, monkeypatch):
    monkeypatch.setattr(lease, "broadcast_from_process_0", lambda function: None)  # as process 1 sees it
    with hold(store) as held:
        held.check()
        assert store.list() == {}
    monkeypatch.setattr(lease, "broadcast_from_process_0", lambda function: "process 1 of there")
    with pytest.raises(LockHeldError, match="process 1 of there is training in"):
        with hold(store):
            pass


HOLDER = """
import sys, time
from diffusion_jax.errors import LeaseLostError
from diffusion_jax.storage import lease, objects
with lease.leased(objects.open_store(sys.argv[1]), ".lock", "is training", 0.1, 1.0) as held:
    print("held", flush=True)
    while True:
        time.sleep(0.1)
        try:
            held.check()
        except LeaseLostError as error:
            sys.exit(f"lost: {error}")
"""


@contextlib.contextmanager
def holder_program(store):
    command = [sys.executable, "-c", HOLDER, store.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


@pytest.mark.whole
def test_a_killed_program_s_lease_is_taken_over(store):
    """After the lease's time while the killed process has not been reaped and so still exists; then at once."""
    with holder_program(store) as holder:
        with pytest.raises(LockHeldError, match=f"process {holder.pid} of .* is training in"):
            with hold(store, last=6):
                pass
        holder.kill()
        with hold(store):
            pass
    with holder_program(store) as holder:
        holder.kill()
        holder.wait()
        if sys.platform == "linux":
            with hold(store, last=60):
                pass


@pytest.mark.whole
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_a_suspended_program_notices_that_it_was_replaced(store):
    with holder_program(store) as holder:
        holder.send_signal(signal.SIGSTOP)
        with hold(store) as held:
            holder.send_signal(signal.SIGCONT)
            err = holder.communicate(timeout=60)[1]
            assert (
                holder.returncode == 1 and err.startswith(f"lost: process {os.getpid()} of ") and "Traceback" not in err
            )
            held.check()
    assert store.list() == {}
