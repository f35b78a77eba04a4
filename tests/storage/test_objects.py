"""Objects in both services: reads return the written bytes, conditional writes, and refusals before any object is
touched."""

import os
import subprocess
import sys
import uuid

import pytest

from diffusion_jax.errors import LeaseLostError, StorageError
from diffusion_jax.storage import objects
from helpers.paths import ROOT


@pytest.fixture
def store(bucket_url):
    return objects.open_store(f"{bucket_url}/runs/a/")


def test_what_is_written_is_found_listed_and_read(store, bucket_url):
    assert store.url == f"{bucket_url}/runs/a" and store.list() == {} and store.find("x") is None
    names = ["config.json", "samples/step 5.png", "odd/na#m[e]*?&é+%2F.txt", "empty"]
    for name in names:
        store.write(name, name.encode() if name != "empty" else b"")
    objects.open_store(bucket_url).write("runs/ab", b"a neighbor")
    store._fs.pipe_file(f"{store._root}/folder/", b"")  # the placeholder that web consoles create
    found = store.list()
    assert sorted(found) == sorted(names) and list(store.list("samples/")) == ["samples/step 5.png"]
    for name in names:
        assert store.read(name) == (name.encode() if name != "empty" else b"")
        assert found[name].size == len(store.read(name)) and store.find(name).tag == found[name].tag
    store.write("config.json", b"new")
    assert store.read("config.json") == b"new" and store.find("config.json").tag != found["config.json"].tag


def test_missing_objects(store, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{store.url}/x does not exist"):
        store.read("x")
    with pytest.raises(FileNotFoundError, match=f"{store.url}/x does not exist"):
        store.download("x", tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        store.move("x", "y")
    assert not list(tmp_path.iterdir())
    store.write("z", b"1")
    store.delete(["x", "z", "y"])
    assert store.list() == {}
    with pytest.raises(ValueError, match="relative"):
        store.read("/x")


def test_conditional_writes(store):
    tag = store.replace("lease", b"1", "")
    assert tag and store.find("lease").tag == tag
    assert store.replace("lease", b"2", "") is None and store.read("lease") == b"1"
    store.check_conditions("lease")
    assert store.read("lease") == b"1" and store.find("lease").tag == tag
    new = store.replace("lease", b"3", tag)
    assert new and new != tag and store.read("lease") == b"3" and store.find("lease").tag == new
    assert store.replace("lease", b"4", tag) is None and store.read("lease") == b"3"
    store.delete(["lease"])
    assert store.replace("lease", b"5", new) is None and store.find("lease") is None


def test_a_launch_that_was_replaced_overwrites_no_file_of_a_checkpoint(store, tmp_path):
    for name in ("new", "other"):
        (tmp_path / name).write_text(name)
    store.write("other", b"of the launch that replaced it")

    def refuse():
        raise LeaseLostError("another launch")

    store.upload_all({tmp_path / "new": "new"}, refuse)
    with pytest.raises(LeaseLostError):
        store.upload_all({tmp_path / "other": "other"}, refuse)
    assert store.read("other") == b"of the launch that replaced it"
    store.upload_all({tmp_path / "other": "other"}, lambda: None)
    assert [store.read(name) for name in ("new", "other")] == [b"new", b"other"]


def test_urls():
    assert objects.is_url("gs://b/run") and objects.is_url("http://x")
    assert not any(objects.is_url(text) for text in ("runs/a", "/gs/x", "~/x", r"C:\x", "a:b", "gs:/x"))
    for url in ("http://x/y", "hdfs://x", "runs/x"):
        with pytest.raises(StorageError, match="must be gs://BUCKET/DIR, s3://BUCKET/DIR or a local directory"):
            objects.open_store(url)
    for url in ("gs://", "gs:///x", "s3://b//x", "s3://b/../x"):
        with pytest.raises(StorageError, match="one slash"):
            objects.open_store(url)


def test_a_missing_bucket_is_named_with_the_command_that_creates_it(bucket_url):
    url = f"{bucket_url[:5]}missing-{uuid.uuid4().hex[:8]}"
    with pytest.raises(StorageError, match=f"the bucket does not exist; type: .* {url}") as caught:
        objects.open_store(f"{url}/run")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


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
@pytest.mark.parametrize(
    ("scheme", "variable", "words"),
    [
        ("gs", "NO_GCE_CHECK", "(Your default credentials were not found); type: gcloud auth application-default"),
        ("s3", "AWS_EC2_METADATA_DISABLED", "(Unable to locate credentials); type: aws configure"),
    ],
)
def test_missing_credentials_are_named(scheme, variable, words, tmp_path):
    code, out = open_in_a_new_process(f"{scheme}://bucket/run", tmp_path, **{variable: "true"})
    assert code == 2 and out.startswith(f"{scheme}://bucket/run: no valid credentials {words}") and out.count("\n") == 1


@pytest.mark.whole
@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(scheme, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    code, out = open_in_a_new_process(f"{scheme}://bucket/run", tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 2 and "pip install" in out and package in out and out.count("\n") == 1
