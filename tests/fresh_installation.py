"""The installation of the README in an empty environment: `make fresh`.

Installs requirements.txt into a new environment, imports TFDS, and trains the network of configs/digits.py for two steps.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = ["--config.training.num_steps=2", "--config.training.batch_size=8", "--config.training.log_every=1"]
FLAGS += ["--config.training.checkpoint_every=2", "--config.sampling.preview_samples=0"]


def main() -> None:
    """Raises: AssertionError or subprocess.CalledProcessError if a step fails."""
    ignored = ("_proxy", "pythonpath")
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith(ignored)}
    with tempfile.TemporaryDirectory() as folder:

        def run(what: str, *command: object, **more: str) -> str:
            start = time.monotonic()
            arguments, environment = list(map(str, command)), variables | more
            out = subprocess.run(
                arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
            return out

        home, workdir = pathlib.Path(folder, "environment"), pathlib.Path(folder, "run")
        python = home / "bin" / "python"
        run("a new environment", sys.executable, "-m", "venv", home)
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-r", "requirements.txt"]
        run("pip install -r requirements.txt", *install, **os.environ)
        run(
            "import of TFDS",
            python,
            "-c",
            "import tensorflow, tensorflow_datasets; tensorflow_datasets.builder_cls('cifar10')",
        )
        command = [python, "main.py", "--config=configs/digits.py", f"--workdir={workdir}", *FLAGS]
        out = run("main.py", *command, JAX_PLATFORMS="cpu")
        assert "651,041 parameters, batch 8." in out and "Done: 2 steps" in out, out
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2], lines
        assert (workdir / "checkpoints" / "2").is_dir()


if __name__ == "__main__":
    main()
