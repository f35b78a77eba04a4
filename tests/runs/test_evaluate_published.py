"""--mode=evaluate of published weights: the protocol, and what their paper reports."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import cli
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.runs import evaluate
from helpers.configs import tiny_config
from helpers.published_files import stored, write_folder

PAPER = ["data.dataset=cifar10", "evaluation.num_samples=50000", "sampling.sampler=ddpm", "sampling.steps=None"]


@pytest.mark.parametrize(("name", "is_unknown"), [("cifar10_uncond_50M_500K.pt", True), ("lsun_cat.pt", False)])
def test_an_unknown_number_of_sampling_steps_is_named(tmp_path, name, is_unknown):
    found = evaluate._find_reported(tiny_config(init_from=name), open_run_dir(tmp_path))
    assert ("; its number of sampling steps is unknown" in evaluate._text(found)) == is_unknown
    assert any(setting.startswith("sampling.steps=") for setting in found["other_settings"]) != is_unknown


@pytest.mark.whole
def test_a_record_has_the_fid_of_the_paper_and_the_settings_that_differ(tmp_path, capsys, monkeypatch):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    folder = write_folder(tmp_path / "ddpm-cifar10-32", json.loads(str(arrays["config"])), weights)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    settings = {
        "data.data_dir": tmp_path / "images",
        "sampling.sampler": "heun",
        "sampling.steps": 8,
        "sampling.spacing": "log_snr",
    }
    settings |= {"evaluation.num_samples": 4, "evaluation.metrics": "energy_distance", "evaluation.likelihood": False}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = cli.parse([f"--pretrained={folder}", f"--workdir={tmp_path / 'run'}", "--mode=evaluate", *flags])
    evaluate.run(command.config, command.workdir)
    (record,) = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["reported"]["fid"] == 3.17 and record["reported"]["paper"] == "Ho et al. 2020"
    assert sorted(record["reported"]["other_settings"]) == PAPER
    printed = capsys.readouterr().out
    assert all(f"--config.{setting}" in printed for setting in PAPER)
    assert (
        "Protocol: 4 samples of ddpm-cifar10-32_ema, sampling.seed=0, heun with 8 steps and 15 network calls" in printed
    )
    assert "was measured here" not in printed
    monkeypatch.setattr(evaluate, "read_records", lambda path: [record | {"fid": 4.25}])
    evaluate.run(command.config, command.workdir)
    assert "FID 4.25 was measured here" in capsys.readouterr().out
    command.config.data.split, command.config.sampling.steps = "test", 1000
    other = evaluate._find_reported(command.config, command.workdir)["other_settings"]
    assert "data.split=train" in other and "sampling.steps=None" not in other
    # A run that trained since has other weights.
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(evaluate, "committed_steps", lambda path: [1])
    assert evaluate._find_reported(command.config, command.workdir) is None
