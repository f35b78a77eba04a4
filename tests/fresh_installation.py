"""The README's first command in an empty environment: `make fresh`.

Installs requirements.txt into a new environment, imports the package in another folder, prepares a small data set in
CIFAR-10's format with TFDS's own builder from a server on this machine, and trains the network of configs/cifar10.py for two
steps.
"""

import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["--config.training.num_steps=2", "--config.training.batch_size=8", "--config.training.log_every=1"]
FLAGS += ["--config.sampling.preview_samples=0"]  # ancestral sampling takes 1,000 network calls


def write_archive(path: pathlib.Path) -> None:
    """Writes a file like cifar-10-binary.tar.gz: each record has a label byte and the bytes of a random 32x32 image."""
    draw = random.Random(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    contents = {name: b"".join(bytes([i]) + draw.randbytes(3072) for i in range(4)) for name in names}
    contents["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    with tarfile.open(path, mode="w:gz") as file:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def prepare(directory: str) -> None:
    """Prepares the data set in a directory, as a launch does for a missing data set. Runs in the new environment."""
    sys.path.insert(0, str(ROOT))
    from diffusion_jax.distributed.devices import silence_libraries

    silence_libraries()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.image_classification.cifar import Cifar10

    from diffusion_jax import data
    from diffusion_jax.config import experiment

    info = Cifar10._cifar_info.fget
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder, "cifar-10-binary.tar.gz")
        write_archive(archive)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url, body = f"http://127.0.0.1:{server.server_port}/{archive.name}", archive.read_bytes()
            size, digest = tfds.core.utils.Size(len(body)), hashlib.sha256(body).hexdigest()
            Cifar10._cifar_info = property(lambda builder: info(builder)._replace(url=url))
            Cifar10.url_infos = {url: UrlInfo(size=size, checksum=digest, filename=archive.name)}
            config = experiment("cifar10")
            config.data.data_dir = directory
            assert len(data.load(config.data)) == 20
            server.shutdown()


def main() -> None:
    """Raises: AssertionError or subprocess.CalledProcessError if a step fails."""
    ignored = ("_proxy", "pythonpath")
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith(ignored)}
    with tempfile.TemporaryDirectory() as folder:

        def run(what: str, *command: object, cwd: str | pathlib.Path = ROOT, **more: str) -> str:
            start = time.monotonic()
            arguments, environment = list(map(str, command)), variables | more
            out = subprocess.run(
                arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
            return out

        home, workdir, data_dir = (pathlib.Path(folder, name) for name in ("environment", "run", "tfds"))
        python = home / "bin" / "python"
        run("a new environment", sys.executable, "-m", "venv", home)
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-r", "requirements.txt"]
        run("pip install -r requirements.txt", *install, **os.environ)
        command = [python, "-c", "import diffusion_jax; print(diffusion_jax.__file__)"]
        out = run("a program in another folder", *command, cwd=folder)
        assert pathlib.Path(out.strip()) == ROOT / "diffusion_jax" / "__init__.py", out
        out = run("preparing a data set", python, __file__, data_dir)
        assert "The data set 'cifar10' is not in" in out, out
        command = [python, "main.py", "--config=configs/cifar10.py", f"--workdir={workdir}"]
        out = run("main.py", *command, f"--config.data.data_dir={data_dir}", *FLAGS, JAX_PLATFORMS="cpu")
        assert "20 examples, 35,746,307 parameters, batch 8." in out and "Done: 2 steps" in out, out
        assert re.search(r"up_1 +7,155,712 parameters +20\.0%", out), out
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2], lines
        assert (workdir / "checkpoints" / "2").is_dir()


if __name__ == "__main__":
    prepare(sys.argv[1]) if len(sys.argv) > 1 else main()
