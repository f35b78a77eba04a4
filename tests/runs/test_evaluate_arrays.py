"""--mode=evaluate of continuous data: likelihoods in the units of the data, metrics of samples."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, likelihood, training
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import array_metrics, array_statistics, metrics
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import measure_likelihood, sample_metrics, train, trained_model, workdir
from diffusion_jax.runs.measure_likelihood import LikelihoodRun
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


class Rows:
    """A source of arrays in memory."""

    def __init__(self, x, **others):
        self.arrays = {"x": x, **others}

    def __len__(self):
        return len(self.arrays["x"])

    def read(self, indices):
        return {name: array[indices] for name, array in self.arrays.items()}


def a_run(directory, config, source):
    """A work directory as training on a source leaves it, with weights at random."""
    untrained(directory, config)
    workdir.check_data(source, RunDir(directory), data.find_normalizations(config.data, source))
    return directory


def config_of(kind, **overrides):
    return array_config(kind, "unused.npz", **{**SMALL, **overrides})


def report(directory):
    return json.loads((directory / "likelihood.json").read_text())


def record(directory):
    return json.loads((directory / "metrics.json").read_text())[-1]


@pytest.fixture
def exact_network(monkeypatch):
    """In place of the network, the exact one for standardized data that are Gaussian with the variance 1."""

    def denoise_fn(self, params, batch):
        schedule = self.trained.schedule

        def network(x_t, time):
            sigma = jnp.sqrt(jax.nn.sigmoid(-schedule.log_snr(time)))
            return sigma.reshape(-1, *(1,) * (x_t.ndim - 1)) * x_t

        return network

    monkeypatch.setattr(LikelihoodRun, "denoise_fn", denoise_fn)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["vectors", "series"])
def test_nats_of_gaussian_data_are_those_of_the_closed_form(kind, tmp_path, exact_network, capsys):
    """For data of variance 1 the chain with the variance beta is q itself, so the bound is tight; and the ODE is exact."""
    x = examples(kind, 64)
    source = Rows(x)
    overrides = {"evaluation.ode": True, "evaluation.ode_trace": "exact", "diffusion.variance": "fixed_large"}
    config = config_of(kind, **overrides)
    run = a_run(tmp_path / "run", config, source)
    measure_likelihood.run(config, run, source)
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
    for key in ("", "ode_"):
        for end in ("", "_standard_error"):
            bits = got[f"{key}bits_per_dim{end}"]
            assert got[f"{key}nats_per_dim{end}"] == pytest.approx(bits * math.log(2), rel=1e-12)
    assert got["standardization_bits"] == pytest.approx(np.log2(scale).mean(), rel=1e-6)
    parts = got["prior"] + got["transitions"] + got["decoder"]
    assert parts == pytest.approx(got["bits_per_dim"], rel=1e-9)
    assert (got["levels"], got["clip"], got["ode_dequantization"]) == (None, False, "none")
    assert (got["split"], got["data_dir"]) == (None, "")
    assert "nats per dimension in the units of the data: prior" in capsys.readouterr().out
    with np.load(run / "likelihood.npz") as arrays:
        assert arrays["vlb"][0] == pytest.approx(got["decoder"], rel=1e-6)
        # E |x_0 - E[x_0 | x_t]|^2 = 1 - alpha_bar.
        schedule = training.schedule_from_config(config.diffusion)
        np.testing.assert_allclose(arrays["distortion"] ** 2, 1 - schedule.alpha_bar, rtol=5 * (2 / 192) ** 0.5)


@pytest.mark.whole
def test_without_a_normalization_the_bits_are_those_of_the_core(tmp_path):
    """Conditions and data reach the network as they are, in the batches and with the keys of the core alone."""
    conditions = np.random.default_rng(3).standard_normal((24, 2))
    source = Rows((examples("series") - 300) / 10, condition=conditions)
    config = config_of("series", **{"data.normalization": "none", "model.condition_features": 2})
    run = a_run(tmp_path / "run", config, source)
    measure_likelihood.run(config, run, source)
    got, built = report(run), training.build_program(config)
    assert got["standardization_bits"] == 0 and "normalization" not in json.loads((run / "data.json").read_text())
    _, params = trained_model.load_weights(config, run, built.model, built.mesh, use_ema=True)

    @jax.jit
    def bound(key, x, condition):
        def denoise_fn(x_t, time):
            return built.model.apply({"params": params}, x_t, time, condition=condition)

        options = {"clip": False, "gray_levels": None, "variance": config.diffusion.variance}
        return likelihood.bits_per_dim(key, built.schedule, denoise_fn, x, **options).total

    totals = []
    for i in range(3):
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        batch = source.read(np.arange(8 * i, 8 * i + 8))
        totals.append(bound(key, batch["x"].astype(np.float32), batch["condition"].astype(np.float32)))
    assert got["bits_per_dim"] == pytest.approx(float(np.mean(totals)), rel=1e-5)
    other = Rows(source.arrays["x"], condition=conditions[::-1])
    measure_likelihood.run(config, run, other)
    assert report(run)["bits_per_dim"] != got["bits_per_dim"]


def test_options_of_gray_levels_are_refused(tmp_path):
    source = Rows(examples("vectors"))
    for overrides, words in (
        ({"evaluation.ode_dequantization": "uniform"}, "'uniform' is for data of gray levels; use None or 'none'"),
        ({"data.levels": 256}, "levels=256, but the data are float32, not uint8: use data.levels=None"),
    ):
        config = config_of("vectors", **overrides, **{"evaluation.ode": True})
        with pytest.raises((UserError, data.DataError), match=words):
            data.load(config.data, source=source)
            measure_likelihood.run(config, tmp_path, source)


@pytest.mark.whole
def test_samples_are_compared_with_the_data(tmp_path, capsys):
    config = config_of("series", **{"data.data_dir": "x.npz", "evaluation.num_samples": 48, "evaluation.seed": 3})
    write_arrays("series", "x.npz", 60)
    x = examples("series", 60)
    run = a_run(tmp_path / "run", config, Rows(x))
    sample_metrics.run(config, run)
    got, (path,) = record(run), (run / "samples").glob("*.npz")
    drawn, constants = np.load(path)["arr_0"], data.find_normalizations(config.data, Rows(x))["x"]
    assert drawn.dtype == np.float32 and abs(drawn.mean() - 300) < 30
    standardized = [constants.apply(part) for part in (x, drawn)]
    energy = array_metrics.energy_distance(*standardized)
    assert got["energy_distance"] == pytest.approx(energy.value, rel=1e-6)
    assert got["energy_distance_standard_error"] == pytest.approx(energy.standard_error, rel=1e-6)
    sliced = array_metrics.sliced_wasserstein(jax.random.key(3), *standardized)
    assert got["sliced_wasserstein"] == pytest.approx(sliced.value) and got["sliced_wasserstein_same_law"] > 0
    with np.load(run / got["files"]["statistics"]) as arrays:  # in the units of the data
        for side, part in (("reference", x), ("samples", drawn)):
            moments, spectrum = array_statistics.mean_and_covariance(part), array_statistics.power_spectrum(part)
            np.testing.assert_allclose(arrays[f"mean_{side}"], moments.mean.value, rtol=1e-5)
            np.testing.assert_allclose(
                arrays[f"covariance_{side}_standard_error"], moments.covariance.standard_error, rtol=1e-4
            )
            np.testing.assert_allclose(arrays[f"spectrum_{side}"], spectrum.value, rtol=1e-4)
            correlation = array_statistics.autocorrelation(part)
            np.testing.assert_allclose(arrays[f"autocorrelation_{side}"], correlation.value, rtol=1e-4, atol=1e-5)
        low, high = x.min(axis=(0, 1)), x.max(axis=(0, 1))
        np.testing.assert_allclose(arrays["histogram_edges"][:, [0, -1]].T, [low, high], rtol=1e-6)
        channel = got["histogram_distance_channel"]
        assert got["histogram_distance"] == arrays["histogram_distance"][channel] == arrays["histogram_distance"].max()
    for name in ("histograms", "spectrum", "autocorrelation", "memorization"):
        with Image.open(run / got["files"][name]) as picture:
            assert picture.width > 100
    assert got["memorization"]["num_samples"] == 48 and got["num_reference"] == 60 and got["features"] is None
    assert "energy_distance  " in capsys.readouterr().out
    # Another metric of the same sets is added to the record.
    config.evaluation.metrics = ("energy_distance",)
    sample_metrics.run(config, run)
    assert len(json.loads((run / "metrics.json").read_text())) == 1
    assert record(run)["sliced_wasserstein"] == got["sliced_wasserstein"]
    assert "power_spectrum_z" in record(run) and record(run)["files"].keys() == got["files"].keys()


@pytest.mark.whole
def test_own_features_are_of_the_data_in_their_units(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text("def moments(x):\n    return x.reshape(len(x), -1) ** 2 / 1e4\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("fid", "precision_recall", "marginal_histograms")
    overrides = {"evaluation.features": "my_features:moments", "evaluation.metrics": names}
    config = config_of("vectors", **overrides, **{"data.data_dir": "x.npz", "evaluation.num_samples": 40})
    x, path = examples("vectors", 50).astype(np.float64), tmp_path / "x.npz"
    write_arrays("vectors", path, 50)
    run = a_run(tmp_path / "run", config, Rows(x))
    sample_metrics.run(config, run)
    got, (path,) = record(run), (run / "samples").glob("*.npz")
    sets = [metrics.moments(part.astype(np.float64) ** 2 / 1e4) for part in (x, np.load(path)["arr_0"])]
    assert got["frechet_distance"] == pytest.approx(metrics.frechet_distance(*sets), rel=1e-3)
    assert 0 <= got["precision"] <= 1 and "histogram_distance" in got and "energy_distance" not in got
    assert got["features"] == "my_features:moments"


@pytest.mark.parametrize(("given", "expected"), [("", "those of the examples of"), ("c.npy", "c.npy")])
def test_samples_have_the_conditions_of_the_reference(given, expected, tmp_path, monkeypatch):
    conditions = np.random.default_rng(3).standard_normal((50, 2)).astype(np.float32)
    np.save("c.npy", conditions[:5])
    write_arrays("vectors", "x.npz", 50, condition=conditions)
    overrides = {
        "model.condition_features": 2,
        "evaluation.num_samples": 40,
        "evaluation.metrics": ("energy_distance",),
    }
    config = config_of("vectors", **overrides, **{"data.data_dir": "x.npz", "sampling.conditions": given})
    run = a_run(tmp_path / "run", config, Rows(examples("vectors", 50), condition=conditions))
    sample_metrics.run(config, run)
    (path,) = (run / "samples").glob("*.npz")
    drawn_with, rows = np.load(path)["condition"], np.arange(40)
    np.testing.assert_array_equal(drawn_with, conditions[rows % 5 if given else rows * 50 // 40])
    assert record(run)["conditions"].startswith(expected)


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        (
            "vectors",
            {"metrics": ("fid",)},
            "fid is not for data with 0 spatial axes and without evaluation.features=mod",
        ),
        ("vectors", {"metrics": ("power_spectrum",)}, "power_spectrum is not for data with 0 spatial axes; use None"),
        ("field", {"metrics": ("autocorrelation",)}, "names from energy_distance, .*power_spectrum, memorization$"),
        ("series", {"features": "inception"}, r"'inception' are features of images; .* arrays \[N, 8, 2\]"),
        ("series", {"num_samples": 39}, "num_samples=39 is too few: these metrics need at least 40"),
    ],
)
def test_options_that_do_not_suit_the_data_are_refused(kind, overrides, words, tmp_path):
    overrides = {"num_samples": 50, **overrides}
    config = config_of(kind, **{f"evaluation.{key}": value for key, value in overrides.items()})
    with pytest.raises(UserError, match=words):
        sample_metrics.run(config, tmp_path, Rows(examples(kind, 50)))


@pytest.mark.whole
def test_training_logs_a_distance_of_own_features_alone(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text("def flat(x):\n    return x.reshape(len(x), -1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = {"evaluation.every": 2, "evaluation.every_samples": 10, "sampling.preview_samples": 0}
    source = Rows(examples("vectors", 50))
    with pytest.raises(UserError, match="these data have no features: set evaluation.features=module:function"):
        train.run(config_of("vectors", **overrides), tmp_path / "run", source)
    train.run(
        config_of("vectors", **overrides, **{"evaluation.features": "own_features:flat"}), tmp_path / "run", source
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["frechet_distance_10_ddim2"] for line in lines if "frechet_distance_10_ddim2" in line]
    # In the units of the data, whose variances are 100, 400 and 900.
    assert len(logged) == 2 and all(10 < distance < 1e5 for distance in logged)
