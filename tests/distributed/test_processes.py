"""Two processes with two devices each, and other device counts: the losses equal a single process's, the data have the same
order, and a run resumes with fewer devices."""

import json
import os

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import default, flatten
from diffusion_jax.metrics import of_features
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import sample, train, workdir
from helpers.array_configs import SHAPES, array_config, write_arrays
from helpers.configs import convolutions_config
from helpers.digits_features import by_hand
from helpers.exact_runs import exact_run
from helpers.paths import ROOT
from helpers.program import ALL_MODES, evaluate, flags_of, run_together
from helpers.work_directories import assert_close_losses, take_arrays, untrained

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
    first, second = run_together(2, *flags_of(convolutions_config(**OVERRIDES), directory), program=program)
    assert "on 4 cpu devices" in first
    assert not any(word in second for word in ("jax ", "Training", "Sampling"))  # only process 0 prints
    return directory


def test_two_processes_log_the_losses_of_one_and_one_process_resumes(two, tmp_path):
    train.run(convolutions_config(**OVERRIDES), tmp_path)
    assert_close_losses(tmp_path, two)
    evaluate(convolutions_config(**OVERRIDES), tmp_path)
    reports = [json.loads((path / "likelihood.json").read_text()) for path in (tmp_path, two)]
    assert reports[0]["bits_per_dim"] == pytest.approx(reports[1]["bits_per_dim"], rel=1e-2)
    for path in (tmp_path, two):  # each process evaluates its own samples
        (record,) = json.loads((path / "metrics.json").read_text())
        drawn = np.load(path / "samples" / "step4_ema_ddpm2_seed0_n10.npz")["arr_0"]
        digits = data.Digits("train", (8, 8), 1)
        moments = [of_features.moments(by_hand(x)) for x in (digits.read(np.arange(len(digits)))["image"], drawn)]
        assert record["frechet_distance"] == pytest.approx(of_features.frechet_distance(*moments), rel=1e-4)
    sample.run(convolutions_config(**OVERRIDES), tmp_path)
    for path in (tmp_path, two):
        with np.load(path / "samples" / "step4_ema_ddpm2_seed0_n4.npz") as arrays:
            assert arrays["arr_0"].shape == (4, 8, 8, 1) and arrays["arr_1"].tolist() == [0, 1, 2, 3]
    for path in (tmp_path, two):  # one device now, four devices before
        train.run(convolutions_config(**{**OVERRIDES, "training.num_steps": 6}), path)
    assert_close_losses(tmp_path, two)


CONFIG_OF_ARRAYS = """
import sys
sys.path.insert(0, {tests!r})
from helpers.array_configs import array_config

def get_config():
    return array_config({kind!r}, {data!r}, **{overrides!r})
"""


def write_config(path, kind, data_file, overrides):
    path.write_text(CONFIG_OF_ARRAYS.format(tests=str(ROOT / "tests"), kind=kind, data=data_file, overrides=overrides))
    return path


def test_two_processes_of_split_parameters_train_and_sample_arrays_with_conditions(tmp_path):
    """Worker processes stream the data; the losses equal those of one process on one device."""
    conditions = np.linspace(-3, 5, 24)[:, None]
    data_file = str(write_arrays("vectors", tmp_path / "data.npz", condition=conditions))
    np.save(tmp_path / "conditions.npy", conditions[:3])
    overrides = {"model.condition_features": 1, "model.condition_dropout": 0.25, "training.log_every": 1}
    overrides |= {"sampling.conditions": str(tmp_path / "conditions.npy"), "sampling.guidance_scale": 2.0}
    overrides |= {"sampling.num_samples": 4, "sampling.batch_size": 4, "training.accumulation_steps": 2}
    split = overrides | {"mesh.fsdp": 4, "data.memory_mb": 0, "data.workers": 1}
    file = write_config(tmp_path / "config.py", "vectors", data_file, split)
    program = tmp_path / "program.py"
    program.write_text(ALL_MODES.replace("(sample, evaluate)", "(sample,)"))
    run_together(2, f"--config={file}", f"--workdir={tmp_path / 'two'}", program=program)
    config = array_config("vectors", data_file, **overrides)
    train.run(config, tmp_path / "one")
    sample.run(config, tmp_path / "one")
    assert_close_losses(tmp_path / "one", tmp_path / "two")
    drawn = [take_arrays(tmp_path / name / "samples")["arr_0"] for name in ("one", "two")]
    np.testing.assert_allclose(*drawn, rtol=1e-3)


def test_two_processes_measure_arrays_as_one(tmp_path):
    """The same weights: likelihoods and the metrics of vectors differ by rounding only, and each file is written once."""
    data_file = str(write_arrays("vectors", tmp_path / "data.npz", 48, condition=np.linspace(-3, 5, 48)[:, None]))
    overrides = {"model.condition_features": 1, "diffusion.num_timesteps": 20, "evaluation.split": "train"}
    overrides |= {"evaluation.num_examples": 22, "evaluation.batch_size": 8, "evaluation.ode": True}
    overrides |= {"evaluation.num_samples": 42, "sampling.batch_size": 16, "sampling.sampler": "ddim"}
    config, source = (
        array_config("vectors", data_file, **overrides),
        data.ArrayFiles(data_file, "train", SHAPES["vectors"]),
    )
    for name in ("one", "two"):
        workdir.check_data(
            source, RunDir(untrained(tmp_path / name, config)), data.find_normalizations(config.data, source)
        )
    evaluate(config, tmp_path / "one")
    file = write_config(tmp_path / "config.py", "vectors", data_file, overrides)
    run_together(2, f"--config={file}", f"--workdir={tmp_path / 'two'}", "--mode=evaluate")
    reports, records = [], []
    for path in (tmp_path / "one", tmp_path / "two"):
        reports.append(json.loads((path / "likelihood.json").read_text()))
        (record,) = json.loads((path / "metrics.json").read_text())
        assert set(record.pop("files").values()) <= set(os.listdir(path))
        assert record.pop("samples").startswith(str(path)) and record.pop("samples_sha256")
        records.append(record)
    assert reports[0]["num_examples"] == 22 and records[0]["num_samples"] == 42
    for one, two in (reports, records):
        assert same_but_for_rounding(one, two), (one, two)


def same_but_for_rounding(one, two):
    """Whether two JSON values are equal, floats to a relative error of 1e-3."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_but_for_rounding(one[key], two[key]) for key in one)
    return one == (pytest.approx(two, rel=1e-3, abs=1e-6) if isinstance(one, float) else two)


def test_two_processes_with_two_devices_test_a_posterior_as_one_device(tmp_path):
    """The network also gets a condition, which is another measurement."""
    config = exact_run(tmp_path, (8, 2), noise=0.3)
    np.save(tmp_path / "mask.npy", np.arange(8) % 3 == 1)
    config.editing.update(task="inpaint", mask=str(tmp_path / "mask.npy"), noise=0.5)
    config.evaluation.update(metrics=("calibration",), calibration_examples=10, batch_size=76)
    config.sampling.steps = 10
    changed = {key: value for key, value in flatten(config).items() if value != flatten(default())[key]}
    flags = [
        f"--config.{key}={value}"
        for key, value in changed.items()
        if key.startswith(("editing", "evaluation", "sampling", "model.kind"))
    ]

    evaluate(config, tmp_path / "run")
    one = take_arrays(tmp_path / "run" / "calibration")
    run_together(2, f"--workdir={tmp_path / 'run'}", "--mode=evaluate", *flags)
    two = take_arrays(tmp_path / "run" / "calibration")
    # quantities: 2 means of channels, 8 entries, 4 components and 5 energies of components
    assert one["samples"].shape == (10, 19, 19)
    for name in ("samples", "chi_squared"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
