"""--mode=evaluate: sample metrics, and the distance that training logs."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax import data, pretrained
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import compare
from diffusion_jax.metrics import of_features
from diffusion_jax.pretrained import PretrainedError
from diffusion_jax.provenance import Provenance
from diffusion_jax.runs import evaluate, train, workdir
from diffusion_jax.runs.train import SampleBatches
from helpers.configs import FEW_DRAWN, FEW_SAMPLES, convolutions_config
from helpers.digits_features import by_hand
from helpers.image_files import all_digits
from helpers.work_directories import reuse_or_draw

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.whole
def test_evaluate_measures_samples(run, monkeypatch):
    evaluate.run(convolutions_config(**FEW_SAMPLES), run)
    (record,) = json.loads((run / "metrics.json").read_text())
    (path,) = (run / "samples").glob("*.npz")
    drawn = np.load(path)["arr_0"]
    moments = [of_features.moments(by_hand(x)) for x in (all_digits(), drawn)]
    assert record["frechet_distance"] == pytest.approx(of_features.frechet_distance(*moments), rel=1e-4)
    assert (record["weights"], record["step"], record["steps"], record["num_samples"]) == ("ema", 1, 2, 20)
    assert record["sampling"]["sampler"] == "ddim"
    monkeypatch.setattr(
        "diffusion_jax.runs.sampling_setup.SamplingSetup.generate_batch", None
    )  # nothing is drawn twice
    evaluate.run(convolutions_config(**FEW_SAMPLES), run)
    monkeypatch.undo()
    evaluate.run(convolutions_config(**FEW_SAMPLES | {"evaluation.use_ema": False}), run)
    _, raw = json.loads((run / "metrics.json").read_text())
    assert raw["weights"] == "raw" and raw["frechet_distance"] != record["frechet_distance"]


@pytest.mark.whole
def test_a_record_has_the_settings_stored_with_the_samples(run, drawn, capsys):
    path = reuse_or_draw(convolutions_config(**FEW_DRAWN), run).path
    stored = dataclasses.replace(Provenance.read(path), details={"jax": "0.0.1"})
    np.savez(path, **stored.add_to({"arr_0": np.load(path)["arr_0"]}))
    evaluate.run(convolutions_config(**FEW_DRAWN, **{"evaluation.metrics": ("fid",)}), run)
    (record,) = json.loads((run / "metrics.json").read_text())
    assert record["drawn_with"] == {"jax": "0.0.1"} and record["sampling"]["sampler"] == "ddim"
    assert record["weights_digest"] == stored.settings["weights_digest"] and len(drawn) == 3
    np.savez(path, arr_0=np.zeros((20, 8, 8, 1), np.uint8), **{"provenance": np.load(path)["provenance"]})
    assert compare._drawing_settings(path) == {} and "how its samples were drawn" in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"evaluation.features": "inception"}, "https://github.com/mseitzer/pytorch-fid/releases/download/"),
        ({"evaluation.num_samples": 7}, "evaluation.num_samples: 7 examples are too few for kid, which needs 8"),
    ],
)
def test_invalid_metric_options_are_refused(run, overrides, words):
    with pytest.raises((UserError, PretrainedError), match=words):
        evaluate.run(convolutions_config(**FEW_SAMPLES | overrides), run)
    assert not (run / "samples").exists()


@pytest.mark.whole
def test_training_logs_the_frechet_distance(tmp_path):
    config = convolutions_config(
        **{"evaluation.every": 2, "evaluation.every_samples": 10, "sampling.preview_samples": 0}
    )
    train.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["frechet_distance_10_ddim2"] for line in lines if "frechet_distance_10_ddim2" in line}
    assert list(logged) == [2, 4]
    # With the EMA weights: the same draws give the same value here.
    net = workdir.open_model(config, tmp_path / "run")
    params = pretrained.load(tmp_path / "run", network=True).params
    batches = SampleBatches(config, net, data.load(config.data), config.sampling.batch_size, 0, "the test")
    drawn = np.concatenate([batches(params, i) for i in range(5)])
    moments = [of_features.moments(by_hand(x)) for x in (all_digits(), drawn)]
    assert logged[4] == pytest.approx(of_features.frechet_distance(*moments), rel=1e-4)
