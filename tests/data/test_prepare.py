"""Data sets that the first launch downloads and prepares, with the tests' own TFDS builder and a local server."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import socket
import threading
import time

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from diffusion_jax import data
from diffusion_jax.data import tfds as source_of_tfds
from helpers.fruit_dataset import LocalFruit, archive, config


class Server(http.server.ThreadingHTTPServer):
    """Serves the archive, or 404 if `missing`."""

    missing, requests, body = False, 0, archive()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.server.missing:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_url(monkeypatch, f"http://127.0.0.1:{server.server_port}/fruit.zip")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def use_url(monkeypatch, url):
    size, checksum = tfds.core.utils.Size(len(Server.body)), hashlib.sha256(Server.body).hexdigest()
    monkeypatch.setattr(LocalFruit, "url", url)
    monkeypatch.setattr(LocalFruit, "url_infos", {url: UrlInfo(size=size, checksum=checksum, filename="fruit.zip")})


def refusal(directory, **more) -> str:
    with pytest.raises(data.DataError) as error:
        data.load(config(directory, **more))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200
    return str(error.value)


def check(source):
    """All twelve images, with their labels; TFDS shuffles them."""
    assert len(source) == 12 and source.class_names == ("apple", "pear")
    shown = source.arrays["image"][:, 0, 0, 0].astype(int) // 10
    assert sorted(shown) == list(range(12))
    np.testing.assert_array_equal(source.arrays["label"], shown % 2)
    assert (source.arrays["image"] == source.arrays["image"][:, :1, :1]).all()


@pytest.mark.whole
def test_a_missing_data_set_is_prepared_once(server, tmp_path, capsys):
    assert "prepare it with: python -c" in refusal(tmp_path, download=False) and server.requests == 0
    check(data.load(config(tmp_path / "new" / "tfds")))
    assert f"The data set 'local_fruit' is not in {tmp_path}/new/tfds: it is downloaded" in capsys.readouterr().out
    info = json.loads((tmp_path / "new/tfds/local_fruit/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    check(data.load(config(tmp_path / "new" / "tfds")))
    assert server.requests == 1 and not capsys.readouterr().out


def test_a_rerun_succeeds_after_a_failed_download_or_builder(server, tmp_path, monkeypatch):
    server.missing = True
    said = refusal(tmp_path)
    assert f"the data set 'local_fruit' cannot be prepared in {tmp_path}: " in said and "HTTP code: 404" in said
    server.missing = False
    monkeypatch.setattr(LocalFruit, "fault", KeyError("a builder's\nown fault"))
    assert "KeyError: \"a builder's" in refusal(tmp_path)
    monkeypatch.setattr(LocalFruit, "fault", None)
    check(data.load(config(tmp_path)))
    assert server.requests == 2  # the archive is kept


def test_a_server_that_does_not_answer(server, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_url(monkeypatch, f"http://127.0.0.1:{port}/fruit.zip")
    assert f"127.0.0.1:{port} does not answer (ConnectionError)" in refusal(tmp_path)
    use_url(monkeypatch, "http://nowhere.invalid/fruit.zip")
    waiting = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: waiting.wait(20) and [])  # it has no timeout
    monkeypatch.setattr(source_of_tfds, "_ANSWER_SECONDS", 0.2)
    said = refusal(tmp_path)
    assert (
        "nowhere.invalid does not answer (no answer in 0 s); set data.data_dir to its directory, or prepare it" in said
    )
    assert "on another machine with: python -c" in said and not list(tmp_path.iterdir())
    waiting.set()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tensorflow_datasets", r"'cifar10' .* is not installed: pip install '\.\[tfds\]'"),
        ("tensorflow", r"needs TensorFlow to prepare a data set: pip install '\.\[tfds\]'"),
    ],
)
def test_missing_packages_are_named_with_the_extra(monkeypatch, tmp_path, module, words):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == module else find_spec(name, *_))
    with pytest.raises(data.DataError, match=words):
        data.load({"dataset": "cifar10", "data_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_other_processes_wait_while_one_prepares(server, tmp_path):
    loaded = []
    with filelock.FileLock(tmp_path / ".prepare.lock"):
        waiting = threading.Thread(target=lambda: loaded.append(data.load(config(tmp_path))))
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive() and server.requests == 0
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.builder("local_fruit", data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    waiting.join()
    check(loaded[0])
    assert server.requests == 1


@pytest.mark.whole
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_parts_of_a_split_and_other_sizes(server, tmp_path, file_format):
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.builder("local_fruit", data_dir=str(tmp_path)).download_and_prepare(file_format=file_format)
    source = data.load(config(tmp_path))
    check(source)
    assert data.natural_shape("local_fruit", str(tmp_path)) == ((8, 8), 1)
    part = config(tmp_path, split="train[3:5]+train[10:]", memory_mb=0)
    batches = data.Batches(data.load(part), 0, 4, 2)
    for step, batch in enumerate(data.stream(batches, workers=1)):
        assert batch["image"].shape == (4, 8, 8, 1)
        np.testing.assert_array_equal(batch["label"], batches[step]["label"])
    np.testing.assert_array_equal(data.load(part).read([0, 3])["image"], source.arrays["image"][[3, 11]])
    assert data.load(part | {"channels": 3, "image_size": 10}).read([1])["image"].shape == (1, 10, 10, 3)
    for split in ("test", "train[abc"):
        with pytest.raises(data.DataError, match="has train"):
            data.load(part | {"split": split})
    if file_format == "tfrecord":
        (shard,) = (tmp_path / "local_fruit").rglob("*.tfrecord*")
        shard.write_bytes(shard.read_bytes()[:-1])
        assert "is corrupted: it has" in refusal(tmp_path)
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace(file_format, "riegeli"))
    assert "in riegeli format, not array_record or tfrecord; prepare it with" in refusal(tmp_path)
