"""Weights by name, hf://OWNER/NAME, from a server on this machine that speaks the Hub's protocol."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from diffusion_jax import pretrained
from diffusion_jax.errors import StorageError
from diffusion_jax.provenance import params_digest
from diffusion_jax.storage import hub
from helpers.configs import tiny_config
from helpers.hub_server import COMMIT, Repository, hub_server
from helpers.paths import ROOT
from helpers.published_files import stored, write_folder
from helpers.work_directories import untrained

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402

CARD = b"---\ntags:\n- ddpm\nlicense: apache-2.0\n---\n# A card\nlicense: another\n"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def pipeline(directory):
    """The files of a repository with a diffusers pipeline."""
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    folder = write_folder(directory / "f", json.loads(str(arrays["config"])), weights)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = {"unet/diffusion_pytorch_model.bin": b"old", "unet/diffusion_pytorch_model.fp16.safetensors": b"half"}
    return files | other | {"README.md": CARD, "safety/model.bin": b"unused"}


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function that starts a server with repositories, and directs huggingface_hub to it and to an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    servers = []

    def start(**repositories):
        servers.append(hub_server(**{name.replace("__", "/"): value for name, value in repositories.items()}))
        monkeypatch.setattr(constants, "ENDPOINT", servers[-1].__enter__())
        template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return constants.ENDPOINT

    def stop():
        hub.download.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # connections to the server may stay open
        while servers:
            servers.pop().__exit__(None, None, None)

    start.stop = stop
    yield start
    stop()


def params_equal(a, b):
    return params_digest(a.params) == params_digest(b.params)


def downloads(url, files):
    """Whether a download has the weights of the repository."""
    return (hub.download(url).path / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_repository_is_downloaded_once_and_only_the_files_of_one_network(serve, tmp_path, capsys):
    repository = Repository(pipeline(tmp_path))
    page = serve(a__b=repository)
    net = pretrained.load("hf://a/b")
    assert params_equal(net, pretrained.load(tmp_path / "f"))
    sent = {
        path.rsplit(f"{COMMIT}/")[1] for kind, path, _ in repository.requests if kind == "GET" and "resolve" in path
    }
    assert sent == {WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", "README.md"}
    assert net.provenance.name == "b"
    assert pretrained.origin(net) == {"source": f"hf://a/b@{COMMIT}", "license": "apache-2.0", "page": f"{page}/a/b"}
    pretrained.describe("hf://a/b")
    assert capsys.readouterr().out.count("License of hf://a/b: apache-2.0") == 1

    hub.download.cache_clear()  # as another program: the cache has the files
    repository.requests.clear()
    assert downloads("hf://a/b@v1", repository.files)
    assert not [path for kind, path, _ in repository.requests if kind == "GET" and "resolve" in path]


def test_file_of_a_repository(serve, tmp_path):
    files = {"x/own.pt": b"12", "x/other.pt": b"3", "x/model.ckpt-7.index": b"4", "x/model.ckpt-7.data": b"5"}
    files |= {"x/own.pt2": b"8", "README.md": b"---\ntags: x\n---\nlicense: mit\n"}  # states no license
    serve(a__b=Repository(files), a__one=Repository({"own.safetensors": b"6", "README.md": CARD, "b.bin": b"7"}))
    found = hub.download("hf://a/b/x/own.pt@v1")
    assert found.path.read_bytes() == b"12" and not found.path.with_name("other.pt").exists()
    assert not found.path.with_name("own.pt2").exists()
    assert found.origin["source"] == f"hf://a/b/x/own.pt@{COMMIT}"
    assert found.origin["license"] == "none stated; ask the owner"
    prefix = hub.download("hf://a/b/x/model.ckpt-7").path
    assert prefix.with_name("model.ckpt-7.index").read_bytes() == b"4"
    assert prefix.with_name("model.ckpt-7.data").read_bytes() == b"5"
    assert hub.download("hf://a/one").path.read_bytes() == b"6"  # the only file of weights in the preferred format


def test_dropped_connection_resumes_where_it_stopped(serve, tmp_path, monkeypatch):
    repository = Repository(pipeline(tmp_path), drop_after=50_000)
    serve(a__b=repository)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    assert downloads("hf://a/b", repository.files)
    ranges = [range_ for kind, path, range_ in repository.requests if kind == "GET" and path.endswith(WEIGHTS)]
    assert ranges[0] is None and 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 50_000


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_changed_byte_is_refused_and_the_file_is_removed(serve, tmp_path, name):
    files = pipeline(tmp_path)
    changed = bytearray(files[name])
    changed[-2] ^= 1
    repository = Repository(files, sent={name: bytes(changed)})
    serve(a__b=repository)
    with pytest.raises(StorageError, match="differs from the digest that the Hub states"):
        hub.download("hf://a/b")
    repository.sent.clear()
    assert downloads("hf://a/b", files) and (hub.download("hf://a/b").path / name).read_bytes() == files[name]


def test_changed_byte_in_the_cache_is_found_without_network(serve, tmp_path):
    files = pipeline(tmp_path)
    serve(a__b=Repository(files))
    hub.download("hf://a/b")
    serve.stop()
    assert downloads("hf://a/b", files)
    with pytest.raises(StorageError, match="cannot be reached"):  # the cache has another revision
        hub.download("hf://a/b@v1")
    blob = (hub.download("hf://a/b").path / WEIGHTS).resolve()
    hub.download.cache_clear()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(StorageError, match="differs from the digest"):
        hub.download("hf://a/b")


def test_without_network_the_line_says_where_to_put_the_files(serve, tmp_path):
    files = pipeline(tmp_path)
    serve(a__b=Repository(files))
    serve.stop()
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        pretrained.load("hf://a/b")
    by_hand = tmp_path / "own" / "diffusion_jax" / "downloads" / "hf" / "a" / "b"
    assert str(by_hand) in str(caught.value)
    shutil.copytree(tmp_path / "f", by_hand)
    assert downloads("hf://a/b", files)
    with pytest.raises(StorageError, match="cannot be reached"):  # the files of another revision are not read
        pretrained.load("hf://a/b@v1")


BAD = {
    "hf://a": "is hf://OWNER/NAME",
    "hf://a/b@v1/model.pt": "is hf://OWNER/NAME",
    "hf://a/../b": "is hf://OWNER/NAME",
    "hf://a/missing": "does not exist or is private",
    "hf://a/gated": "is gated; accept its conditions there",
    "hf://a/b@v2": "has no revision 'v2'",
    "hf://a/b/model.pt": "the repository has no model.pt; it has one.pt, two.pt",
    "hf://a/b": "several files of weights; name one: hf://a/b/FILE with one.pt, two.pt",
    "hf://a/none": "has no file of weights",
}


@pytest.mark.parametrize("url", BAD)
def test_names_that_cannot_be_loaded(serve, url):
    gated = Repository({"one.pt": b""}, gated=True)
    serve(a__b=Repository({"one.pt": b"", "two.pt": b""}), a__gated=gated, a__none=Repository({"x.txt": b""}))
    with pytest.raises(StorageError, match=BAD[url].replace("(", r"\(")) as caught:
        hub.download(url)
    assert "\n" not in str(caught.value)


def test_token_of_a_gated_repository(serve, tmp_path, monkeypatch):
    serve(a__gated=Repository(pipeline(tmp_path), gated=True))
    monkeypatch.setenv("HF_TOKEN", "good")
    assert downloads("hf://a/gated", pipeline(tmp_path / "again"))


def test_full_disk(serve, tmp_path, monkeypatch):
    serve(a__b=Repository(pipeline(tmp_path)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError, match="needs 0.0 GB, and .* has 0.0 GB left; set HF_HOME"):
        pretrained.load("hf://a/b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match="the disk is full; set HF_HOME"):
        pretrained.load("hf://a/b")


@pytest.mark.thorough
def test_license_travels_with_what_is_made_from_the_weights(serve, tmp_path, capsys):
    from diffusion_jax.pretrained import __main__

    serve(a__b=Repository(pipeline(tmp_path)))
    __main__.main(["convert", "hf://a/b", str(tmp_path / "own.safetensors")])
    assert pretrained.load(tmp_path / "own.safetensors").provenance.details["license"] == "apache-2.0"
    card = (tmp_path / "own.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n') and f"hf://a/b@{COMMIT} | apache-2.0" in card
    capsys.readouterr()
    for license, differs in (("mit", True), ("Apache-2.0", False)):
        publish("hf://a/b", str(tmp_path / license), f"--license={license}", "--data=x")
        assert (f"(license: apache-2.0), published as {license}" in capsys.readouterr().out) == differs
    __main__.main(["convert", str(tmp_path / "f"), str(tmp_path / "plain.safetensors")])
    assert (tmp_path / "plain.md").read_text().startswith('---\nlicense: "unknown"  # fill in\n')


def publish(path, to, *flags):
    from diffusion_jax.pretrained import __main__

    __main__.main(["publish", str(path), to, *flags])


def test_a_published_run_is_loaded_by_its_name(serve, tmp_path, monkeypatch, capsys):
    run = untrained(tmp_path / "run", tiny_config())
    (run / "samples").mkdir()
    (run / "samples" / "a.npz").write_bytes(b"")
    (run / "samples" / "a.png").write_bytes(b"a picture")
    (run / "samples" / "newer.npz").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"not of the run")
    (run / "samples" / "newer.png").symlink_to(tmp_path / "secret")
    serve()
    flags = "--license=mit", "--data=8x8 digits, [see](x)"
    monkeypatch.setenv("HF_TOKEN", "good")
    publish(run, "hf://me/digits/", *flags)
    net, again = pretrained.load(run), pretrained.load("hf://me/digits")
    assert params_equal(again, net) and again.diffusion == net.diffusion and again.levels == net.levels == 17
    assert pretrained.origin(again)["license"] == "mit"
    publish(run, str(tmp_path / "folder"), *flags)
    names = {
        path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*") if path.is_file()
    }
    assert {"README.md", "samples.png", hub.OWN_FILE, "unet/config.json", "scheduler/scheduler_config.json"} <= names
    (tmp_path / "new").touch()
    modes = {(tmp_path / "folder" / name).stat().st_mode for name in names}
    assert modes == {(tmp_path / "new").stat().st_mode}  # as the umask allows, also for other users
    assert str(tmp_path) not in (tmp_path / "folder" / "README.md").read_text()
    assert (tmp_path / "folder" / "samples.png").read_bytes() == b"a picture"
    again = pretrained.load(tmp_path / "folder")
    assert params_equal(again, net) and again.levels == net.levels == 17
    card = (tmp_path / "folder" / "README.md").read_text()
    assert (
        card.startswith('---\nlicense: "mit"\n')
        and r"8x8 digits, \[see\](x)" in card
        and "![samples](samples.png)" in card
    )


@pytest.mark.thorough
def test_a_network_that_diffusers_lacks_is_published_in_one_format(tmp_path, monkeypatch, capsys):
    """A folder named .. is no folder of the temporary files, which are removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "precious").write_bytes(b"")
    made = {"path": "edm", "prediction": "x_0", "preconditioning": "consistency", "variance": "fixed_small"}
    config = tiny_config(**{f"diffusion.{name}": value for name, value in made.items()})
    net = pretrained.from_config(config)
    params = net.model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), np.zeros(1))["params"]
    pretrained.save_safetensors(net.with_params(params), tmp_path / "own.safetensors")
    for to in (tmp_path / "folder", tmp_path / "new" / ".."):
        publish(tmp_path / "own.safetensors", str(to), "--license=mit", "--data=x")
        assert pretrained.load(to).sigma_min > 0
        card = (to / "README.md").read_text()
        assert 'library_name: "diffusion_jax"' in card and "DDPMPipeline" not in card
    assert "Note: without diffusers' format" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == ["precious"]


@pytest.mark.whole
def test_weights_are_published_once_to_a_bucket(tmp_path, bucket_url, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    pipeline(tmp_path)
    to, flags = f"{bucket_url}/weights/cifar", ("--license=mit", "--data=x")
    publish(tmp_path / "f", to, *flags)
    assert params_equal(pretrained.load(tmp_path / "f"), pretrained.load(to))
    with pytest.raises(SystemExit):
        publish(tmp_path / "f", to, *flags)
    assert "has objects already; delete them" in capsys.readouterr().err
    publish(tmp_path / "f", f"{bucket_url}/weights/ci", *flags)  # a neighbor


@pytest.mark.thorough
def test_what_cannot_be_published_is_refused_in_one_line(serve, tmp_path, capsys):
    serve()
    pipeline(tmp_path)
    for to, flags, words in (
        ("hf://me/x", ("--license=mit",), "needs --license=NAME"),
        ("hf://me/x/y", ("--license=mit", "--data=x"), "published to hf://OWNER/NAME"),
        ("hf://me/..", ("--license=mit", "--data=x"), "published to hf://OWNER/NAME"),
        ("hf://me/x", ("--license=mit", "--data=x"), "log in with `hf auth login`"),
        (str(tmp_path), ("--license=mit", "--data=x"), "is not an empty folder"),
    ):
        with pytest.raises(SystemExit):
            publish(tmp_path / "f", to, *flags)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.whole
def test_command_line_with_the_variables_of_huggingface_hub(tmp_path):
    with hub_server(**{"a/b": Repository(pipeline(tmp_path))}) as address:
        variables = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "main.py", "weights", "inspect", "hf://a/b"]
        first = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert first.returncode == 0 and "License of hf://a/b: apache-2.0" in first.stdout
        offline = variables | {"HF_HUB_OFFLINE": "1"}
        second = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
        assert second.returncode == 0 and second.stdout == first.stdout
        offline["HF_HOME"] = str(tmp_path / "another")
        third = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
        assert third.returncode == 2 and len(third.stderr.strip().splitlines()) == 1
        assert "download its files on another machine into" in third.stderr
