"""Data sets that are downloaded and prepared at the first launch: a TFDS builder of the tests' own, and a local server."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from diffusion_jax import data
from diffusion_jax.data import preparation
from diffusion_jax.runs import train, workdir
from helpers.configs import tiny_config
from helpers.fruit_dataset import NAMES, LocalFruit, archive, config
from helpers.paths import ROOT
from helpers.work_directories import lines


class Server(http.server.ThreadingHTTPServer):
    """Serves the archive; `behavior`: "good", or how it fails."""

    behavior, requests = "good", 0
    body = archive()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self):
        self.server.requests += 1
        behavior, body = self.server.behavior, self.server.body
        if behavior.isdigit():
            self.send_error(int(behavior))
            return
        self.send_response(200)
        if behavior != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if behavior == "drops":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif behavior == "stalls":
            self.server.stalled.wait(200)
        elif behavior != "no length":
            self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    server.stalled = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/fruit.zip"
    info = UrlInfo(
        size=tfds.core.utils.Size(len(Server.body)),
        checksum=hashlib.sha256(Server.body).hexdigest(),
        filename="fruit.zip",
    )
    monkeypatch.setattr(LocalFruit, "url", url)
    monkeypatch.setattr(LocalFruit, "url_infos", {url: info})
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


def leftovers(directory: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in directory.rglob("*") if ".tmp." in p.name or p.name.startswith("incomplete.")]


def refusal(directory, **more) -> str:
    with pytest.raises(data.DataError) as error:
        data.load(config(directory, **more))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert not leftovers(directory)
    return str(error.value)


def check(source):
    """All twelve images, with their labels; TFDS shuffles them."""
    assert len(source) == 12 and source.class_names == ("apple", "pear")
    shown = source.arrays["image"][:, 0, 0, 0].astype(int) // 10
    assert sorted(shown) == list(range(12))
    np.testing.assert_array_equal(source.arrays["label"], shown % 2)
    assert (source.arrays["image"] == source.arrays["image"][:, :1, :1]).all()


def test_load_downloads_and_prepares_a_missing_data_set_once(server, tmp_path, capsys):
    check(data.load(config(tmp_path / "new" / "tfds")))
    said = capsys.readouterr().out.splitlines()
    assert "is not in" in said[0] and "0.0 MB to download" in said[0]
    assert said[-1].startswith("Prepared 'local_fruit': 12 examples")
    info = json.loads((tmp_path / "new/tfds/local_fruit/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and not leftovers(tmp_path)
    check(data.load(config(tmp_path / "new" / "tfds")))
    assert server.requests == 1 and not capsys.readouterr().out


@pytest.mark.whole
def test_training_prepares_a_missing_data_set(server, tmp_path, capsys):
    own = {f"data.{leaf}": value for leaf, value in config(tmp_path / "tfds").items()} | {"sampling.preview_samples": 0}
    train.run(tiny_config(**own), tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["step"] == 4
    said = capsys.readouterr().out
    assert said.index("Prepared 'local_fruit'") < said.index("12 images of 2 classes: 0 apple, 1 pear.")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == NAMES
    workdir.check_identity(tiny_config(**{**own, "data.download": False}), tmp_path / "run")  # the same run


def test_load_without_download_sends_no_request(server, tmp_path):
    said = refusal(tmp_path, download=False)
    assert "prepare it with: python -c" in said and server.requests == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("behavior", "message"),
    [
        ("404", "download failed: .*HTTP code: 404.*same command"),
        ("403", "HTTP code: 403"),
        ("503", "download failed: too many 503 error responses"),
        ("drops", "download failed: Connection broken: IncompleteRead.*; rerun the same command"),
        ("no length", "download failed: wrong checksum of http://127.0.0.1.*/fruit.zip: .*same command"),
        ("stalls", "download failed: .*Read timed out"),
        ("damaged", "wrong checksum"),
    ],
)
def test_rerun_succeeds_after_a_failed_download(server, tmp_path, monkeypatch, behavior, message):
    monkeypatch.setattr(preparation, "_READ_SECONDS", 0.3)
    if behavior == "damaged":
        server.body = b"\0" + server.body[1:]
    server.behavior = behavior
    with pytest.raises(data.DataError, match=message):
        data.load(config(tmp_path))
    assert not leftovers(tmp_path) and not (tmp_path / "local_fruit" / "1.0.0").exists()
    server.behavior, server.body = "good", Server.body
    check(data.load(config(tmp_path)))


def test_prepare_reports_a_refused_connection(server, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(LocalFruit, "url", f"http://127.0.0.1:{port}/fruit.zip")
    said = refusal(tmp_path)
    assert (
        f"cannot be downloaded: no connection to 127.0.0.1:{port} (Connection refused)" in said and "python -c" in said
    )
    assert [path.name for path in tmp_path.rglob("*")] == [".prepare.lock"]
    (tmp_path / "downloads" / "extracted").mkdir(parents=True)  # empty folders of another program stay
    refusal(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".prepare.lock", "downloads", "extracted"]


def test_prepare_reports_a_name_resolution_without_answer(server, tmp_path, monkeypatch):
    """Name resolution has no timeout of its own."""
    waiting = threading.Event()
    monkeypatch.setattr(LocalFruit, "url", "http://nowhere.invalid/fruit.zip")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: waiting.wait(20) and [])
    monkeypatch.setattr(preparation, "_CONNECT_SECONDS", 0.2)
    assert "no connection to nowhere.invalid:80 (no answer" in refusal(tmp_path)
    waiting.set()


def test_prepare_downloads_through_a_proxy(server, tmp_path, monkeypatch):
    """The server's name means nothing here; the proxy, which is the local server, answers for it."""
    url = "http://nowhere.invalid/fruit.zip"
    monkeypatch.setattr(LocalFruit, "url_infos", {url: LocalFruit.url_infos[LocalFruit.url]})
    monkeypatch.setattr(LocalFruit, "url", url)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    check(data.load(config(tmp_path)))


def test_request_address_reads_the_url_and_the_proxy(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    assert preparation.request_address("https://a.org/x") == ("a.org", 443)
    assert preparation.request_address("http://a.org:81/x") == ("a.org", 81)
    monkeypatch.setenv("https_proxy", "http://user:word@proxy.org:3128")
    assert preparation.request_address("https://a.org/x") == ("proxy.org", 3128)
    assert preparation.request_address("http://a.org/x") == ("a.org", 80)
    monkeypatch.setenv("no_proxy", "a.org")
    assert preparation.request_address("https://a.org/x") == ("a.org", 443)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(28, "No space left on device"), "cannot be prepared in .*No space left on device.*set data.data_dir"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (KeyError("a builder's\nown fault"), "cannot be prepared"),
        (ImportError("no module named scipy"), "no module named scipy"),
    ],
)
def test_prepare_reports_the_error_of_a_builder_in_one_line(server, tmp_path, monkeypatch, fault, message):
    monkeypatch.setattr(LocalFruit, "fault", fault)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(config(tmp_path))
    assert "\n" not in str(error.value) and not leftovers(tmp_path)
    monkeypatch.setattr(LocalFruit, "fault", None)
    check(data.load(config(tmp_path)))
    assert server.requests == 1  # the archive is kept


def test_prepare_shows_the_instructions_for_a_manual_download(tmp_path):
    said = refusal(tmp_path, dataset="local_manual/large")
    assert f"must be downloaded by hand, into {tmp_path}/downloads/manual: Register at example.org." in said


def test_prepare_refuses_unusable_directories(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert "set data.data_dir" in refusal(tmp_path / "file")
    assert "set data.data_dir" in refusal(tmp_path / "file" / "below")
    (tmp_path / "half" / "local_fruit" / "1.0.0").mkdir(parents=True)
    assert "is not a complete data set" in refusal(tmp_path / "half")


def test_prepare_removes_the_partial_files_of_a_killed_launch(server, tmp_path):
    """Of this program: what is older than the killed launch may be of another."""
    folders = [tmp_path / "downloads/local_fruit/x.tmp.1", tmp_path / "local_fruit/incomplete.ABCDEF_1.0.0"]
    old = tmp_path / "downloads/local_fruit/y.tmp.2"
    for folder in (*folders, old):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"half")
    for path in (old / "part", old):
        os.utime(path, (time.time() - 3600,) * 2)
    lock = tmp_path / ".prepare.lock"
    lock.write_text("process 1 of a machine")
    os.utime(lock, (time.time() - 60,) * 2)
    check(data.load(config(tmp_path)))
    assert leftovers(tmp_path) == [old] and lock.read_text() == ""


HOLD = """
import sys, time
from diffusion_jax.data.preparation import exclusive_lock
import pathlib
with exclusive_lock(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.whole
def test_other_processes_wait_while_one_prepares(server, tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".prepare.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with contextlib.closing(holder.stdin):
        assert holder.stdout.readline() == "held\n"
        loaded = []
        waiting = threading.Thread(target=lambda: loaded.append(data.load(config(tmp_path))))
        waiting.start()
        said = ""
        while "Waiting" not in said:
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert f"Waiting for process {holder.pid} of" in said and server.requests == 0
    waiting.join()
    check(loaded[0])
    assert holder.wait() == 0


def test_prepare_accepts_a_data_set_that_another_process_prepared(server, tmp_path, monkeypatch):
    """Where there are no locks, both prepare, and one finds the place taken."""
    real = tfds.core.GeneratorBasedBuilder.download_and_prepare

    def beaten(builder, **options):
        monkeypatch.setattr(LocalFruit, "download_and_prepare", real)
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.builder("local_fruit", data_dir=str(tmp_path)).download_and_prepare(**options)
        raise OSError("Directory not empty")

    monkeypatch.setattr(LocalFruit, "download_and_prepare", beaten)
    check(data.load(config(tmp_path)))


def test_prepare_reports_progress(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "_REPORT_SECONDS", 0.02)
    monkeypatch.setattr(preparation, "_READ_SECONDS", 0.3)
    server.behavior = "stalls"
    refusal(tmp_path)
    assert f"Downloading 'local_fruit': 0.0 MB of {len(server.body) / 1e6:.1f} MB" in capsys.readouterr().out


@pytest.mark.whole
def test_tfds_reads_tfrecord_without_conversion(server, tmp_path, capsys):
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.builder("local_fruit", data_dir=str(tmp_path)).download_and_prepare(file_format="tfrecord")
        tfds.builder("local_fruit", data_dir=str(tmp_path / "a")).download_and_prepare(file_format="array_record")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    source, other = data.load(config(tmp_path)), data.load(config(tmp_path / "a"))
    check(source)
    np.testing.assert_array_equal(source.arrays["image"], other.arrays["image"])  # in the same order
    part = config(tmp_path, split="train[3:5]+train[10:]", memory_mb=0)
    batches = data.Batches(data.load(part), 0, 4, 2)
    for step, batch in enumerate(data.stream(batches, workers=1)):
        assert batch["image"].shape == (4, 8, 8, 1)
        np.testing.assert_array_equal(batch["label"], batches[step]["label"])
    np.testing.assert_array_equal(data.load(part).read([0, 3])["image"], source.arrays["image"][[3, 11]])
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (shard,) = (tmp_path / "local_fruit").rglob("*.tfrecord*")
    for cut in (before[shard][:-1], before[shard][: len(before[shard]) // 2], b""):
        shard.write_bytes(cut)
        with pytest.raises(data.DataError, match="is corrupted: it has"):
            data.load(part)
    shard.unlink()
    with pytest.raises(data.DataError, match="No such file"):
        data.load(part)


LAUNCH = """
import sys
sys.path.insert(0, sys.argv[1])
from diffusion_jax import data
from diffusion_jax.data import preparation
from helpers.fruit_dataset import LocalFruit, config
preparation._READ_SECONDS = 1000
LocalFruit.url, LocalFruit.url_infos = sys.argv[2], None
data.load(config(sys.argv[3]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_download_leaves_no_files_and_restarts(server, tmp_path, stop):
    """The next one begins anew, and nothing of the first is left."""
    server.behavior = "stalls"
    tests = str(ROOT / "tests")
    launch = subprocess.Popen([sys.executable, "-c", LAUNCH, tests, LocalFruit.url, str(tmp_path)])
    while not list(tmp_path.rglob("*.tmp.*/fruit.zip")):
        assert launch.poll() is None
        time.sleep(0.05)
    launch.send_signal(stop)
    launch.wait(timeout=150)  # although the server is silent
    assert bool(leftovers(tmp_path)) == (stop == signal.SIGKILL)
    server.behavior = "good"
    check(data.load(config(tmp_path)))
    assert not leftovers(tmp_path)
