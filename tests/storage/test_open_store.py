"""What open_store refuses before any object is touched: missing packages, missing and unusable credentials."""

import os
import socket
import subprocess
import sys

import pytest

from helpers.paths import ROOT

OPEN = """
import sys
from diffusion_jax.errors import StorageError
from diffusion_jax.storage import objects
try:
    objects.open_store(sys.argv[1])
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def silent_address():
    """The address of a server that accepts connections and never answers, as a metadata server may seem behind a firewall."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def open_in_a_new_process(url, home, **variables):
    """(exit code, output) of a program that opens a URL without credentials and emulators."""
    left_out = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "GCE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"HOME": str(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, url], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


@pytest.mark.whole
def test_no_credentials_and_no_metadata_server(tmp_path, silent_address):
    variables = {"GCE_METADATA_IP": silent_address, "GCE_METADATA_HOST": silent_address}
    code, out = open_in_a_new_process("gs://bucket/run", tmp_path, **variables)
    reason = (
        "no valid credentials (Your default credentials were not found); type: gcloud auth application-default login"
    )
    assert code == 2 and out.startswith(f"gs://bucket/run: {reason}") and out.count("\n") == 1
    variables = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{silent_address}/"}
    code, out = open_in_a_new_process("s3://bucket/run", tmp_path, **variables)
    reason = "no valid credentials (Unable to locate credentials); type: aws configure"
    assert code == 2 and out.startswith(f"s3://bucket/run: {reason}") and out.count("\n") == 1


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(scheme, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    code, out = open_in_a_new_process(f"{scheme}://bucket/run", tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 2 and "pip install" in out and package in out and out.count("\n") == 1
