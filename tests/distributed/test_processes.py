"""Two processes of two devices each, and other numbers of devices: the losses of one, the data in the same order, and a run
that goes on with fewer than it began with."""

import json

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.metrics import of_features
from diffusion_jax.runs import sample, train
from helpers.array_configs import array_config, write_arrays
from helpers.configs import tiny_config
from helpers.digits_features import by_hand
from helpers.paths import ROOT
from helpers.program import ALL_MODES, evaluate, run_together, tiny_flags
from helpers.work_directories import assert_close_losses

pytestmark = pytest.mark.whole

OVERRIDES = {"model.num_classes": 10, "sampling.preview_samples": 0, "training.log_every": 1, "sampling.num_samples": 4}
OVERRIDES |= {"evaluation.num_examples": 6, "evaluation.batch_size": 4, "evaluation.strata": 4}
OVERRIDES |= {"evaluation.num_samples": 10}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Four steps by two processes, their samples and their bound."""
    directory = tmp_path_factory.mktemp("two")
    program = directory.with_suffix(".py")
    program.write_text(ALL_MODES)
    first, second = run_together(2, *tiny_flags(directory, **OVERRIDES), program=program)
    assert "on 4 cpu devices" in first
    assert not any(word in second for word in ("jax ", "Training", "Sampling"))  # the first alone speaks
    return directory


def test_two_processes_log_the_losses_of_one_and_one_process_resumes(two, tmp_path):
    train.run(tiny_config(**OVERRIDES), tmp_path)
    assert_close_losses(tmp_path, two)
    evaluate(tiny_config(**OVERRIDES), tmp_path)
    reports = [json.loads((path / "likelihood.json").read_text()) for path in (tmp_path, two)]
    assert reports[0]["bits_per_dim"] == pytest.approx(reports[1]["bits_per_dim"], rel=1e-2)
    for path in (tmp_path, two):  # each judged its own samples
        (record,) = json.loads((path / "metrics.json").read_text())
        drawn = np.load(path / "samples" / "step4_ema_ddpm2_seed0_n10.npz")["arr_0"]
        digits = data.Digits("train", (8, 8), 1)
        moments = [of_features.moments(by_hand(x)) for x in (digits.read(np.arange(len(digits)))["image"], drawn)]
        assert record["frechet_distance"] == pytest.approx(of_features.frechet_distance(*moments), rel=1e-4)
    sample.run(tiny_config(**OVERRIDES), tmp_path)
    for path in (tmp_path, two):
        with np.load(path / "samples" / "step4_ema_ddpm2_seed0_n4.npz") as arrays:
            assert arrays["arr_0"].shape == (4, 8, 8, 1) and arrays["arr_1"].tolist() == [0, 1, 2, 3]
    for path in (tmp_path, two):  # one device; before, four
        train.run(tiny_config(**{**OVERRIDES, "training.num_steps": 6}), path)
    assert_close_losses(tmp_path, two)


CONFIG = """
import sys
sys.path.insert(0, {path!r})
from helpers.array_configs import array_config

def get_config():
    return array_config("vectors", {data_file!r}, **{overrides!r})
"""


def test_two_processes_of_split_parameters_train_and_sample_arrays_with_conditions(tmp_path):
    """Streamed by worker processes, as one process on one device."""
    conditions = np.linspace(-3, 5, 24)[:, None]
    data_file = str(write_arrays("vectors", tmp_path / "data.npz", condition=conditions))
    np.save(tmp_path / "conditions.npy", conditions[:3])
    overrides = {"model.condition_features": 1, "model.condition_dropout": 0.25, "training.log_every": 1}
    overrides |= {"sampling.conditions": str(tmp_path / "conditions.npy"), "sampling.guidance_scale": 2.0}
    overrides |= {"sampling.num_samples": 4, "sampling.batch_size": 4, "training.accumulation_steps": 2}
    split = overrides | {"mesh.fsdp": 4, "data.memory_mb": 0, "data.workers": 1}
    file, program = tmp_path / "config.py", tmp_path / "program.py"
    file.write_text(CONFIG.format(path=str(ROOT / "tests"), data_file=data_file, overrides=split))
    program.write_text(ALL_MODES.replace("(sample, evaluate)", "(sample,)"))
    run_together(2, f"--config={file}", f"--workdir={tmp_path / 'two'}", program=program)
    config = array_config("vectors", data_file, **overrides)
    train.run(config, tmp_path / "one")
    sample.run(config, tmp_path / "one")
    assert_close_losses(tmp_path / "one", tmp_path / "two")
    drawn = []
    for name in ("one", "two"):
        (path,) = (tmp_path / name / "samples").glob("*.npz")
        drawn.append(np.load(path)["arr_0"])
    np.testing.assert_allclose(*drawn, rtol=1e-3)
