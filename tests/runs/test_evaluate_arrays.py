"""--mode=evaluate with continuous data: likelihoods in data units, sample metrics, and the choice of examples."""

import json
import math

import jax
import numpy as np
import pytest

from diffusion_jax import Denoiser, data, metrics, pretrained, training
from diffusion_jax.errors import UserError
from diffusion_jax.metrics import of_arrays
from diffusion_jax.runs import evaluate, likelihood, train
from diffusion_jax.runs.likelihood import LikelihoodRun, measure_likelihood
from helpers.array_configs import array_config, examples, write_arrays
from helpers.work_directories import untrained

pytestmark = pytest.mark.usefixtures("own_cache")

T = 20
SMALL = {
    "diffusion.num_timesteps": T,
    "evaluation.split": "train",
    "evaluation.batch_size": 8,
    "evaluation.num_samples": 0,
    "sampling.sampler": "ddim",
    "sampling.batch_size": 16,
    "optimizer.learning_rate": 1e-4,
}


def rows_of(x, **others):
    return data.InMemory({"x": x, **others})


def config_of(kind, **overrides):
    return array_config(kind, "unused.npz", **{**SMALL, **overrides})


def report(directory):
    return json.loads((directory / "likelihood.json").read_text())


def record(directory):
    return json.loads((directory / "metrics.json").read_text())[-1]


@pytest.fixture
def exact_network(monkeypatch):
    """Replaces the network by the exact network for Gaussian data with variance 1 after standardization."""

    def denoiser(self, **inputs):
        return Denoiser(lambda x_t, time: self.schedule.path.at(time, x_t).sigma * x_t)

    monkeypatch.setattr(pretrained.Model, "denoiser", denoiser)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["vectors", "series"])
def test_nats_of_gaussian_data_are_those_of_the_closed_form(kind, tmp_path, exact_network):
    """For data with variance 1, the chain with variance beta equals q, so the bound is tight; the ODE is exact."""
    x = examples(kind, 64)
    source = rows_of(x)
    overrides = {"evaluation.ode": True, "evaluation.ode_trace": "exact", "diffusion.variance": "fixed_large"}
    config = config_of(kind, **overrides)
    run = untrained(tmp_path / "run", config, source)
    measure_likelihood(config, run, source)
    got, channels = report(run), x.reshape(-1, x.shape[-1]).astype(np.float64)
    scale = channels.std(axis=0)
    squares = np.square((x - channels.mean(axis=0)) / scale).reshape(len(x), -1).mean(axis=1)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * squares + np.log(scale).mean()
    with np.load(run / "likelihood.npz") as arrays:
        total, ode = (math.log(2) * arrays[f"example_{name}"] for name in ("total", "ode"))
    np.testing.assert_allclose(ode, expected, atol=5e-4)
    noise = total - expected
    assert abs(noise.mean()) < 4 * noise.std(ddof=1) / 8 and noise.std(ddof=1) / 8 < 0.1
    assert got["ode_nats_per_dim"] == pytest.approx(ode.mean()) and got["nats_per_dim"] == pytest.approx(total.mean())
    assert got["bits_per_dim"] == pytest.approx(got["nats_per_dim"] / math.log(2), rel=1e-12)
    assert got["standardization_bits"] == pytest.approx(np.log2(scale).mean(), rel=1e-6)
    parts = got["prior"] + got["transitions"] + got["decoder"]
    assert parts == pytest.approx(got["bits_per_dim"], rel=1e-9)
    assert (got["levels"], got["clip"], got["ode_dequantization"]) == (None, False, "none")
    with np.load(run / "likelihood.npz") as arrays:
        assert arrays["vlb"][0] == pytest.approx(got["decoder"], rel=1e-6)
        # E |x_0 - E[x_0 | x_t]|^2 = 1 - alpha_bar.
        schedule = training.schedule_from_config(config.diffusion)
        np.testing.assert_allclose(arrays["distortion"] ** 2, 1 - schedule.alpha_bar, rtol=5 * (2 / 192) ** 0.5)


def test_a_table_is_the_mean_over_examples_in_data_units():
    """Two batches with other steps in each row: only the decoder, at index 0, contains a density of the data."""
    rng, bits = np.random.default_rng(0), 1.5
    outs = [
        {name: rng.normal(size=(size, 4)) for name in ("vlb", "mse", "x_0_mse")}
        | {name: rng.normal(size=size) for name in ("total", "prior", "decoder")}
        | {"t": rng.permuted(np.tile(np.arange(4), (size, 1)), axis=1)}
        for size in (3, 2)
    ]
    arrays = likelihood._join([likelihood._sum_over_examples(out, 4) for out in outs], bits)
    t = np.concatenate([out["t"] for out in outs])
    for name, added in (("vlb", bits * (np.arange(4) == 0)), ("mse", 0), ("x_0_mse", 0)):
        values = np.concatenate([out[name] for out in outs])
        at = np.stack([values[t == step] for step in range(4)], axis=1)
        np.testing.assert_allclose(arrays[name], at.mean(axis=0) + added, rtol=1e-12)
        np.testing.assert_allclose(arrays[f"{name}_standard_error"], at.std(axis=0, ddof=1) / 5**0.5, rtol=1e-12)
    for name, added in (("total", bits), ("prior", 0), ("decoder", bits)):
        np.testing.assert_allclose(arrays[f"example_{name}"], np.concatenate([out[name] for out in outs]) + added)


@pytest.mark.whole
def test_without_a_normalization_conditions_reach_the_network_as_they_are(tmp_path):
    conditions, missing = np.random.default_rng(3).standard_normal((24, 2)), np.arange(24) == 3
    source = rows_of((examples("series") - 300) / 10, condition=conditions, condition_missing=missing)
    model = {"model.condition_features": 2, "model.condition_dropout": 0.1}
    config = config_of("series", **{"data.normalization": "none", **model})
    run = untrained(tmp_path / "run", config, source)
    measure_likelihood(config, run, source)
    got, batch = report(run), LikelihoodRun(config, run, source).read(np.arange(5))
    assert got["standardization_bits"] == 0 and "normalization" not in json.loads((run / "data.json").read_text())
    np.testing.assert_array_equal(batch["x"], source.arrays["x"][:5].astype(np.float32))
    np.testing.assert_array_equal(
        batch["condition"], np.where(missing[:, None], np.nan, conditions)[:5].astype(np.float32)
    )
    other = rows_of(source.arrays["x"], condition=conditions[::-1])
    measure_likelihood(config, run, other)
    assert report(run)["bits_per_dim"] != got["bits_per_dim"]


def test_dequantization_of_data_without_gray_levels_is_refused(tmp_path):
    config = config_of("vectors", **{"evaluation.ode_dequantization": "uniform", "evaluation.ode": True})
    with pytest.raises(UserError, match="'uniform' is for data of gray levels, not for"):
        measure_likelihood(config, tmp_path, rows_of(examples("vectors")))


@pytest.mark.whole
def test_samples_are_compared_with_the_data(tmp_path):
    names = (*metrics.choose_metrics(None, 1, False, False), "helpers.own_networks:mean_shift")
    options = {"evaluation.num_samples": 48, "evaluation.seed": 3, "evaluation.metrics": names}
    config = config_of("series", **{"data.data_dir": "x.npz", **options})
    write_arrays("series", "x.npz", 60)
    x = examples("series", 60)
    run = untrained(tmp_path / "run", config, rows_of(x))
    evaluate.measure_samples(config, run)
    got, (path,) = record(run), (run / "samples").glob("*.npz")
    drawn, constants = np.load(path)["arr_0"], data.find_normalizations(config.data, rows_of(x))["x"]
    assert drawn.dtype == np.float32 and abs(drawn.mean() - 300) < 30
    assert got["mean_shift"] == pytest.approx(drawn.mean() - x.mean(), rel=1e-3)  # the user's metric is in data units
    standardized = [constants.apply(part) for part in (x, drawn)]
    energy = of_arrays.energy_distance(*standardized)
    assert got["energy_distance"] == pytest.approx(energy.value, rel=1e-6)
    assert got["energy_distance_standard_error"] == pytest.approx(energy.standard_error, rel=1e-6)
    sliced = of_arrays.sliced_wasserstein(jax.random.key(3), *standardized)
    assert got["sliced_wasserstein"] == pytest.approx(sliced.value) and got["sliced_wasserstein_same_distribution"] > 0
    with np.load(run / got["files"]["statistics"]) as arrays:  # in data units
        for side, part in (("reference", x), ("samples", drawn)):
            moments, spectrum = of_arrays.mean_and_covariance(part), of_arrays.power_spectrum(part)
            np.testing.assert_allclose(arrays[f"mean_{side}"], moments.mean.value, rtol=1e-5)
            np.testing.assert_allclose(arrays[f"spectrum_{side}"], spectrum.value, rtol=1e-4)
        channel = got["histogram_distance_channel"]
        assert got["histogram_distance"] == arrays["histogram_distance"][channel] == arrays["histogram_distance"].max()
    assert all((run / got["files"][name]).exists() for name in ("histograms", "spectrum", "memorization"))
    assert got["memorization"]["num_samples"] == 48 and got["num_reference"] == 60 and got["features"] is None
    # Another metric for the same sets is added to the record.
    config.evaluation.metrics = ("energy_distance",)
    evaluate.measure_samples(config, run)
    assert len(json.loads((run / "metrics.json").read_text())) == 1
    assert record(run)["sliced_wasserstein"] == got["sliced_wasserstein"]
    assert "power_spectrum_z" in record(run) and record(run)["files"].keys() == got["files"].keys()


@pytest.mark.parametrize(
    ("given", "expected"), [("", "conditions of"), pytest.param("c.npy", "c.npy", marks=pytest.mark.whole)]
)
def test_samples_have_the_conditions_of_the_reference(given, expected, tmp_path):
    conditions = np.random.default_rng(3).standard_normal((50, 2)).astype(np.float32)
    np.save("c.npy", conditions[:5])
    arrays = {"condition": conditions, "condition_missing": np.arange(50) % 4 == 0}
    write_arrays("vectors", "x.npz", 50, **arrays)
    config = config_of("vectors", **{"data.data_dir": "x.npz", "sampling.conditions": given})
    config.model.update(condition_features=2, condition_dropout=0.1)
    own = "helpers.own_networks:by_condition"
    config.evaluation.update(num_samples=40, metrics=("energy_distance", own))
    run = untrained(tmp_path / "run", config, rows_of(examples("vectors", 50), **arrays))
    evaluate.measure_samples(config, run)
    (path,) = (run / "samples").glob("*.npz")
    drawn_with, rows = np.load(path), np.arange(40)
    for name in ("condition",) if given else arrays:
        np.testing.assert_array_equal(
            drawn_with[name], arrays[name][rows % 5 if given else of_arrays.subset_indices(50, 40)]
        )
    assert record(run)["conditions"].startswith(expected)
    shown = ~arrays["condition_missing"][of_arrays.subset_indices(50, 40)] | bool(given)
    assert record(run)["condition"] == pytest.approx(drawn_with["condition"][shown].mean(), rel=1e-5)
    config.evaluation.metrics = ("helpers.own_networks:by_class",)
    config.sampling.seed = 5
    with pytest.raises(UserError, match="by_class takes reference_label, but there is no label with the reference"):
        evaluate.measure_samples(config, run)
    assert list((run / "samples").glob("*.npz")) == [path]  # nothing was drawn


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("vectors", {"metrics": ("fid",)}, "fid is not for data with 0 spatial axes and without features=module:"),
        ("field", {"metrics": ("autocorrelation",)}, "names from energy_distance, .*power_spectrum, memorization$"),
        ("series", {"features": "inception"}, r"'inception' needs images; .* arrays \[N, \*spatial, C\]"),
        ("series", {"num_samples": 39}, "num_samples: 39 examples are too few for sliced_wasserstein, which needs 40"),
    ],
)
def test_options_that_do_not_suit_the_data_are_refused(kind, overrides, words, tmp_path):
    overrides = {"num_samples": 50, **overrides}
    config = config_of(kind, **{f"evaluation.{key}": value for key, value in overrides.items()})
    with pytest.raises(UserError, match=words):
        evaluate.measure_samples(config, tmp_path, rows_of(examples(kind, 50)))


def test_training_logs_a_distance_of_features_alone(tmp_path):
    config = config_of("vectors", **{"evaluation.every": 2, "sampling.preview_samples": 0})
    with pytest.raises(UserError, match="these data have no features: set evaluation.features=module:function"):
        train.run(config, tmp_path / "run", rows_of(examples("vectors", 50)))


# ---- Which examples


def test_examples_of_another_file_have_no_split(tmp_path, capsys):
    """Other weights were not trained on the config's file, either."""
    own, other = (write_arrays("vectors", tmp_path / f"{name}.npz", count) for name, count in (("x", 40), ("y", 5)))
    run = untrained(tmp_path / "run", array_config("vectors", own), data.load(array_config("vectors", own).data))
    for file, split, count in ((other, None, 5), (f"{tmp_path}/../{tmp_path.name}/x.npz", "train", 40)):
        found = LikelihoodRun(array_config("vectors", own, **{"evaluation.data_dir": str(file)}), run)
        assert found.split == split and len(found.source) == count
        assert ("trained on" in capsys.readouterr().out) == (split == "train")
    found = LikelihoodRun(array_config("vectors", own, init_from=str(run)), tmp_path / "other")
    assert found.split is None and "trained on" not in capsys.readouterr().out


def test_held_out_examples_are_the_test_split(tmp_path, capsys):
    file = write_arrays("vectors", tmp_path / "x.npz", 40)
    config = array_config("vectors", file, **{"data.holdout": 0.25})
    trained_on = data.load(config.data)
    run = untrained(tmp_path / "run", config, trained_on)
    found = LikelihoodRun(config, run)
    assert found.split == "test" and "trained on" not in capsys.readouterr().out

    def rows(source):
        return {row.tobytes() for row in source.read(np.arange(len(source)))["x"]}

    normalized = data.Normalized(trained_on, found.net.normalizations)
    assert not rows(found.source) & rows(normalized) and len(rows(found.source) | rows(normalized)) == 40
    # Samples are compared with the training split, or with the test split.
    reference = evaluate.load_reference(config)
    assert reference.name.endswith(":train") and rows(reference.examples) == rows(trained_on)
    config.evaluation.reference_split = "test"
    assert len(evaluate.load_reference(config).examples) == 40 - len(trained_on)
    config.evaluation.split = "train"
    assert LikelihoodRun(config, run).split == "train" and "(split 'train')" in capsys.readouterr().out
    # All of a caller's examples are measured.
    assert len(LikelihoodRun(config, run, trained_on).source) == len(trained_on)
