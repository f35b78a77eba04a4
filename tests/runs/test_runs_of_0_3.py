"""Runs that version 0.3 trained for three steps: two more steps and four samples are those of 0.3.

tests/fixtures/runs_of_0_3 has the runs, their data and their FILE.py, as 0.3 wrote them, and expected.json: the logs and
samples of 0.3. digits: an unconditional network. series: a condition. edm: EDM's path, preconditioning and draw. own: a
network, loss and timestep sampler of FILE.py. own_path: a network, path and draw of FILE.py. 0.3 stored /runs/parts.py as
the name of FILE.py.
"""

import json
import shutil
import tarfile

import numpy as np
import pytest

from diffusion_jax import cli
from diffusion_jax.runs.logging import read_metrics
from helpers.paths import ROOT

RUNS = ROOT / "tests" / "fixtures" / "runs_of_0_3"
EXPECTED = json.loads((RUNS / "expected.json").read_text())

# A function of a stored run is only used if the command names it.
OWN = {
    "own": {"model.kind": "network", "diffusion.loss": "robust", "diffusion.timestep_sampler": "late"},
    "own_path": {"model.kind": "network", "diffusion.path": "path", "diffusion.draw": "laplace"},
}


@pytest.mark.whole
@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_of_0_3_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in RUNS.iterdir():
        if path.suffix in (".py", ".npz", ".npy"):
            shutil.copy(path, tmp_path)
    with tarfile.open(RUNS / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    own = [f"--config.{setting}=parts.py:{function}" for setting, function in OWN.get(name, {}).items()]
    cli.main(["--workdir=run", "--mode=sample", *own])
    (path,) = (tmp_path / "run" / "samples").glob("step3_*.npz")
    with np.load(path) as arrays:
        samples, expected = arrays["arr_0"], np.array(EXPECTED[name]["samples"])
    assert samples.shape == expected.shape
    np.testing.assert_allclose(samples, expected, rtol=1e-5, atol=1 if samples.dtype == np.uint8 else 0)
    cli.main(["--workdir=run", "--config.training.num_steps=5", *own])
    steps = [line for line in read_metrics("run") if line["step"] > 3]
    assert [line["step"] for line in steps] == [4, 5]
    for line, old in zip(steps, EXPECTED[name]["steps"], strict=True):
        np.testing.assert_allclose([line[key] for key in old], list(old.values()), rtol=1e-5)
