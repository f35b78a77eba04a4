"""--mode=evaluate with the metric calibration, for networks that are exact, and for a posterior with the wrong noise."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax import covariances, errors, metrics, posterior
from diffusion_jax.measurements import Measurement
from diffusion_jax.runs import calibration, evaluate
from diffusion_jax.runs.posterior import Problem
from helpers.configs import conditional
from helpers.exact_runs import exact_run
from helpers.work_directories import take_arrays, untrained

SHAPE = (8, 2)
OWN = """
import numpy as np


def roughness(x):
    return {"roughness": np.abs(np.diff(x, axis=1)).mean(axis=(1, 2))}


def wrong(x):
    return {"wrong": x}
"""


def measured(root, config, **settings):
    """Runs the evaluation; returns the record of its JSON file, and the arrays."""
    config = config.copy_and_resolve_references()
    config.evaluation.metrics = ("calibration",)
    config.sampling.steps = 20
    config.update_from_flattened_dict(settings)
    evaluate.run(config, root / "run")
    (path,) = (root / "run" / "calibration").glob("*.json")
    record = json.loads(path.read_text())
    path.unlink()
    return record, take_arrays(path.parent, has_picture=True)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    (root / "own.py").write_text(OWN)
    return root, exact_run(root, SHAPE)


def posterior_of(root, **settings):
    np.save(root / "mask.npy", np.arange(8) % 3 == 0)
    return {"editing.task": "inpaint", "editing.mask": str(root / "mask.npy"), "editing.noise": 0.5, **settings}


@pytest.mark.whole
def test_an_exact_posterior_has_no_error_and_explains_the_measurement(exact, capsys):
    root, config = exact
    settings = {"evaluation.quantities": ("means", f"{root / 'own.py'}:roughness"), "editing.iterations": 6}
    record, arrays = measured(root, config, **posterior_of(root, **settings, **{"evaluation.batch_size": 400}))
    assert record["sentence"] == "no error found with 100 examples of 19 samples"
    assert list(record["quantities"]) == [
        "mean of channel 0",
        "mean of channel 1",
        "roughness",
        "distance",
        "classifier",
    ]
    assert abs(record["chi_squared"] - 1) < 4 * record["chi_squared_standard_error"]
    assert abs(record["coverage"] - 0.9) < 4 * record["coverage_standard_error"] < 0.15
    assert "a shift of " in record["power"] and record["power"] in capsys.readouterr().out
    with np.load(root / "test.npz") as file:
        np.testing.assert_allclose(arrays["truth"][:, 0], file["x"][:100, :, 0].mean(axis=1))
    assert arrays["samples"].shape == (100, 19, 3)
    # Samples follow their own truth, in data units.
    assert np.corrcoef(arrays["samples"][..., 0].mean(axis=1), arrays["truth"][:, 0])[0, 1] > 0.7
    assert np.corrcoef(arrays["references"][:, 0], arrays["truth"][:, 0])[0, 1] > 0.7


@pytest.mark.whole
def test_a_result_does_not_depend_on_the_batch(exact):
    root, config = exact
    settings = posterior_of(root, **{"evaluation.calibration_examples": 10})
    one, two = (measured(root, config, **settings, **{"evaluation.batch_size": size})[1] for size in (19, 80))
    np.testing.assert_allclose(one["samples"], two["samples"], rtol=1e-4)
    np.testing.assert_allclose(one["chi_squared"], two["chi_squared"], rtol=1e-3)


@pytest.mark.whole
def test_a_wrong_method_is_named(exact, monkeypatch):
    """A sampler that assumes five times the noise: its deviations are too wide."""
    root, config = exact
    monkeypatch.setattr(
        Problem,
        "_mmps",
        lambda self, denoiser, measurement: posterior.mmps(
            denoiser, dataclasses.replace(measurement, noise=5 * measurement.noise), self.covariance
        ),
    )
    record, _ = measured(root, config, **posterior_of(root, **{"evaluation.batch_size": 1900}))
    assert "too wide" in record["sentence"] or "ignore the measurement" in record["sentence"], record["sentence"]
    assert record["chi_squared"] > 5


@pytest.mark.whole
def test_entries_with_infinite_noise_are_hidden_from_the_references(exact):
    """A blur with error bars at two of eight positions; a reference that knew the others would be the truth."""
    root, config = exact
    noise = np.full((8, 2), np.inf)
    noise[::4] = [2.0, 0.1]
    np.save(root / "noise.npy", noise)
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.editing.noise = str(root / "noise.npy")
    settings = {"editing.task": "deblur", "evaluation.batch_size": 1900}
    record, _ = measured(root, config, **settings)
    assert record["sentence"] == "no error found with 100 examples of 19 samples"
    assert abs(record["chi_squared"] - 1) < 4 * record["chi_squared_standard_error"]


@pytest.mark.whole
def test_samples_of_images_have_the_gray_levels_of_the_truths(tmp_path):
    """Digits have 17 levels; their classes are inputs of the regression and of the network."""
    config = conditional(**{"editing.task": "sparse", "editing.noise": 20.0})
    untrained(tmp_path / "run", config)
    settings = {"evaluation.calibration_examples": 10, "evaluation.calibration_samples": 3, "evaluation.batch_size": 30}
    record, arrays = measured(tmp_path, config, **settings, **{"sampling.steps": 2, "evaluation.use_ema": False})
    entries = [name.startswith("channel 0") for name in record["quantities"] if name not in ("distance", "classifier")]
    assert sum(entries) == 4 and "energy of components 2 to 3" in record["quantities"]
    levels = np.round(np.arange(17) * 255 / 16)
    for name in ("truth", "samples"):
        assert np.isin(arrays[name][..., entries], levels).all(), name


@pytest.mark.whole
def test_missing_training_data_leave_out_the_components(exact, capsys):
    root, config = exact
    settings = {"editing.covariance": "jacobian", "evaluation.calibration_examples": 10, "evaluation.batch_size": 190}
    train = root / "train.npz"
    moved = train.rename(root / "moved.npz")
    try:
        config = config.copy_and_resolve_references()
        config.evaluation.data_dir = str(root / "test.npz")
        record, _ = measured(root, config, **posterior_of(root, **settings))
        assert "component 1" not in record["quantities"] and "are not tested" in capsys.readouterr().out
        with pytest.raises(errors.DataError, match="use --config.editing.covariance=jacobian"):
            measured(root, config, **posterior_of(root, **settings | {"editing.covariance": "data"}))
    finally:
        moved.rename(train)


@pytest.mark.whole
def test_a_jacobian_that_has_not_converged_is_noted(exact, capsys):
    root, config = exact
    settings = {"editing.covariance": "jacobian", "editing.iterations": 1, "evaluation.calibration_examples": 10}
    settings |= {"editing.task": "deblur", "editing.mask": "", "evaluation.batch_size": 190}
    record, arrays = measured(root, config, **posterior_of(root, **settings))
    assert record["residual"] > 0.05 and "use more editing.iterations" in (printed := capsys.readouterr().out)
    assert "by principal components" in printed and "component 1" in record["quantities"]  # tested, but not used
    np.testing.assert_allclose(arrays["residual"], record["residual"])


@pytest.mark.whole
def test_a_conditional_model_is_tested_with_the_conditions_of_its_examples(tmp_path):
    config = exact_run(tmp_path, SHAPE, noise=0.3)
    record, arrays = measured(tmp_path, config, **{"evaluation.batch_size": 400})
    assert record["sentence"].startswith("no error found") and "chi_squared" not in record
    assert "channel 1 at 3" in record["quantities"]
    # A reference from the condition predicts the truth, also where the condition has no number.
    assert np.corrcoef(arrays["references"][:, 3], arrays["truth"][:, 3])[0, 1] > 0.7
    # Conditions of other examples: the samples are calibrated for no example.
    with np.load(tmp_path / "test.npz") as file:
        np.savez(tmp_path / "moved.npz", x=file["x"], condition=np.roll(file["condition"], 1, axis=0))
    config.evaluation.data_dir = str(tmp_path / "moved.npz")
    record, _ = measured(tmp_path, config, **{"evaluation.batch_size": 400})
    assert "too narrow" in record["sentence"]


@pytest.mark.whole
def test_a_posterior_given_a_field_and_a_measurement_has_no_error(tmp_path):
    config = exact_run(tmp_path, SHAPE, noise=0.3, is_field=True)
    settings = posterior_of(tmp_path, **{"editing.iterations": 6, "evaluation.batch_size": 400})
    record, _ = measured(tmp_path, config, **settings)
    assert record["sentence"] == "no error found with 100 examples of 19 samples"
    assert abs(record["chi_squared"] - 1) < 4 * record["chi_squared_standard_error"]


@pytest.mark.whole
def test_commands_that_do_not_fit_are_refused(exact):
    root, config = exact
    for settings, words in (
        ({}, "tests samples given .*editing.noise=VALUE"),
        (posterior_of(root, **{"sampling.conditions": "c.npy"}), "takes the classes and conditions of held-out"),
        (posterior_of(root, **{"evaluation.quantities": (f"{root / 'own.py'}:wrong",)}), "must return a dict"),
        ({"editing.task": "deblur", "editing.noise": 1.0, "editing.method": "project"}, "'project' is not for"),
    ):
        with pytest.raises(errors.UserError, match=words):
            measured(root, config, **settings)


def test_names_and_values_of_quantities():
    x = np.arange(2 * 3 * 4 * 2.0).reshape(1, 2, 3, 4, 2)
    values, names = calibration.find_quantities(("means", "entries", "components"), x, x)
    assert names[:4] == ["mean of channel 0", "mean of channel 1", "channel 0 at 0, 1", "channel 1 at 0, 1"]
    assert len(names) == 2 + 4 * 2
    np.testing.assert_array_equal(values[0, :, 0], x[0, ..., 0].mean(axis=(1, 2)))
    np.testing.assert_array_equal(values[0, :, names.index("channel 1 at 2, 2")], x[0, :, 2, 2, 1])
    vectors = np.arange(6.0).reshape(1, 2, 3)
    values, names = calibration.find_quantities(("means", "entries"), vectors, vectors)
    assert names == ["channel 0", "channel 1", "channel 2"]
    np.testing.assert_array_equal(values, vectors)


@pytest.mark.parametrize("is_periodic", [False, True])
def test_components_are_those_of_the_covariance_and_energies_of_what_the_mean_leaves(is_periodic):
    """By hand: eigenvectors in the order of their variances, with groups of 1, 2, 4 and 1."""
    rng = np.random.default_rng(0)
    examples, x = rng.normal(size=(50, 8, 1)) * np.arange(1, 9)[:, None], rng.normal(size=(3, 5, 8, 1))
    basis = covariances.fourier(examples) if is_periodic else covariances.principal(examples)
    values, names = calibration.find_quantities(("components",), 10 * x, x, basis)
    dense = basis.times(np.eye(8)[..., None]).reshape(8, 8)
    vectors = np.linalg.eigh(dense)[1]
    residual = x - x.mean(axis=0)
    if not is_periodic:
        np.testing.assert_allclose(np.abs(values[..., 1]), np.abs(x[..., 0] @ vectors[:, -2]), rtol=1e-6)
        found = (residual[..., 0] @ vectors[:, ::-1])[..., 3:7]
        energy = values[..., names.index("energy of components 4 to 7")]
        np.testing.assert_allclose(energy, np.sqrt((found**2).mean(axis=-1)), rtol=1e-6)
    assert [name for name in names if "energy" in name][:3] == [
        f"energy of components {a} to {b}" for a, b in ((1, 1), (2, 3), (4, 7))
    ]
    assert "energy of the rest" not in names  # the eigenvectors lack nothing
    few = covariances.principal(examples, components=2)
    values, names = calibration.find_quantities(("components",), x, x, few)
    assert names[-1] == "energy of the rest"
    kept = np.linalg.svd(examples[..., 0] - examples[..., 0].mean(axis=0))[2][:2]
    rest = residual[..., 0] - residual[..., 0] @ kept.T @ kept
    np.testing.assert_allclose(values[..., -1], np.sqrt((rest**2).mean(axis=-1)), rtol=1e-6)


def gaussian_posterior(seed, ratio=1.0, leak=0.0):
    """Tests samples of a posterior of series [16, 1] given three numbers; returns the sentence.

    ratio: the deviation of the samples, in deviations of the posterior. leak: of noise that is added to the samples.
    """
    rng, shape = np.random.default_rng(seed), (16, 1)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    prior = covariances.from_eigenvectors(np.geomspace(4, 1e-3, 16), basis.reshape(16, *shape))
    rows = Measurement(lambda x: x[:, ::6, 0], np.zeros((1, 3), np.float32), 0.3)
    given = prior.given(rows, shape)
    c, a = (prior.times(np.eye(16)[..., None]).reshape(16, 16), np.eye(16)[::6])
    x = rng.normal(size=(100, 16)) @ np.linalg.cholesky(c).T
    y = x @ a.T + 0.3 * rng.normal(size=(100, 3))
    mean = y @ np.linalg.solve(a @ c @ a.T + 0.09 * np.eye(3), a @ c)
    root = np.linalg.cholesky(given.times(np.eye(16)[..., None]).reshape(16, 16) + 1e-12 * np.eye(16))
    samples = mean + ratio * rng.normal(size=(19, 100, 16)) @ root.T + leak * rng.normal(size=(19, 100, 16))
    both = np.concatenate([x[None], samples])[..., None]
    values, names = calibration.find_quantities(("means", "entries", "components"), both, both, given)
    values /= values[0].std(axis=0)
    references = metrics.calibration.cross_predict(y, values[0])
    return metrics.calibration.find_calibration(values[0], values[1:], references, names).sentence


def test_an_exact_posterior_is_flagged_in_few_of_200_evaluations():
    """A false alarm has a probability of 0.27% for all quantities together, so five in 200 have one of 1e-4."""
    assert sum(not gaussian_posterior(seed).startswith("no error found") for seed in range(200)) < 5


def test_samples_that_leave_the_data_are_found_by_their_energy():
    """Noise with three times the deviation of the smallest component; means and entries do not see it."""
    found = [gaussian_posterior(seed, leak=0.1) for seed in range(20)]
    assert all("energy of components" in sentence for sentence in found)
    assert not any("channel 0" in sentence or "mean of" in sentence for sentence in found)
    assert all("too wide" in gaussian_posterior(seed, ratio=2.0) for seed in range(3))
