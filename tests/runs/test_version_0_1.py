"""A work directory that version 0.1 wrote: four steps of a narrow digits network, in fixtures/run_0_1."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.runs import stored_config, train
from diffusion_jax.training.checkpoints import Checkpoints
from helpers.paths import FIXTURES
from helpers.work_directories import lines

LOSSES = {2: 0.9605381488800049, 4: 0.9711610078811646, 6: 0.8707452416419983, 8: 0.829208254814148}  # as 0.1 logs them


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(FIXTURES / "run_0_1", tmp_path / "run")


def test_its_config_is_translated(workdir):
    stored = json.loads((workdir / "config.json").read_text())
    assert "ode_dequantisation" in stored["evaluation"] and "memorisation" in stored["evaluation"]["metrics"]
    config = stored_config.from_workdir(workdir)
    assert config.evaluation.ode_dequantization == "uniform" and "memorization" in config.evaluation.metrics
    assert config.model.channels == 8 and config.model.channel_multipliers == (1, 2)


def test_its_state_is_restored_exactly(workdir):
    """Digests that 0.1 computed of every array of its state."""
    program = training.build_program(stored_config.from_workdir(workdir))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(program.abstract_state)
    restored = {
        jax.tree_util.keystr(path): hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:16]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert restored == json.loads((workdir / "state_sha256.json").read_text())


def test_it_resumes_with_the_losses_of_version_0_1(workdir):
    """Between two machines the same program differs by rounding: 1e-7 a step, grown by four updates of Adam."""
    config = stored_config.from_workdir(workdir)
    config.training.num_steps = 8
    train.run(config, workdir)
    assert {line["step"]: pytest.approx(line["loss"], rel=1e-3) for line in lines(workdir)} == LOSSES
