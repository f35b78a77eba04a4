"""--mode=edit with noisy measurements, against exact posteriors of Gaussian data."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from diffusion_jax import errors, pretrained
from diffusion_jax.config.rules import edit_method
from diffusion_jax.data import Normalization
from diffusion_jax.images import to_gray_levels
from diffusion_jax.runs import edit
from diffusion_jax.runs.posterior import Problem, covariance_of_data
from diffusion_jax.runs.sampling_setup import resolve_sampling
from helpers.array_configs import SHAPES, array_config
from helpers.configs import tiny_config
from helpers.exact_runs import OFFSET, SCALE, covariance, exact_run
from helpers.work_directories import take_arrays

SHAPE = (8, 2)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    return root, exact_run(root, SHAPE)


def edited(exact, **settings):
    """Runs an edit; returns the arrays of its file."""
    root, config = exact
    config = config.copy_and_resolve_references()
    with config.ignore_type():  # as the command line does
        config.editing.update(**settings)
    edit.run(config, root / "run")
    return take_arrays(root / "run" / "samples" / "edits", has_picture=True)


def exact_posterior(y, seen, noise):
    """Mean and deviation in data units, for the rows `seen` [M, 16] of A and noise in network units [M]."""
    prior = covariance(SHAPE)
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + np.diag(noise**2))
    deviation = np.sqrt(np.diag(prior - gain @ seen @ prior)).reshape(SHAPE)
    return (gain @ y).reshape(SHAPE) * SCALE + OFFSET, deviation * SCALE


@pytest.mark.whole
def test_samples_given_noisy_sensors_have_the_exact_mean_and_deviation(exact, capsys):
    """Three sensors that measure both channels, from a file in data units; the noise is one number in data units."""
    root, config = exact
    points = np.array([[0.0], [3.5], [7.0]])
    seen = np.zeros((6, *SHAPE))
    for i, (entry, weight) in enumerate([(0, 0), (3, 0.5), (7, 0)]):
        for c in range(2):
            seen[2 * i + c, entry, c] += 1 - weight
            seen[2 * i + c, min(entry + 1, 7), c] += weight
    y = np.array([[0.5, -1.0], [1.5, 0.4], [-0.3, 0.9]])  # network units
    np.save(root / "points.npy", points)
    np.save(root / "y.npy", y * SCALE + OFFSET)
    settings = {"task": "sparse", "image": str(root / "y.npy"), "operator": str(root / "points.npy"), "noise": 0.4}
    found = edited((root, config), **settings, num_samples=400)
    mean, deviation = exact_posterior(y.ravel(), seen.reshape(6, -1), np.tile(0.4 / SCALE, 3))
    z = (found["mean"] - mean) / (deviation / np.sqrt(400))
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(found["deviation"] / deviation, 1, atol=0.15)
    np.testing.assert_allclose(found["measurement"], y * SCALE + OFFSET, rtol=1e-5)
    assert found["arr_0"].shape == (400, *SHAPE) and "truth" not in found
    np.testing.assert_allclose(found["arr_0"].mean(axis=0), found["mean"], rtol=1e-5)
    # chi-squared by hand
    x = (found["arr_0"] - OFFSET) / SCALE
    residual = (x.reshape(400, -1) @ seen.reshape(6, -1).T - y.ravel()) / np.tile(0.4 / SCALE, 3)
    np.testing.assert_allclose(found["chi_squared"], (residual**2).mean(axis=1), rtol=1e-2)
    assert "Chi-squared per measured number (6 numbers): " in (printed := capsys.readouterr().out)
    assert "far above 1" not in printed


KELVIN = """
import jax.numpy as jnp
import numpy as np


def kelvin(x):
    \"\"\"Means of neighboring entries, in another unit.\"\"\"
    return 1.8 * (x[:, ::2] + x[:, 1::2]) / 2 + 32


def rounds(x):
    return jnp.round(x)


def mixes(x):
    return x - x.mean(axis=0)


def of_numpy(x):
    return np.sort(x)


def totals(x):
    return x.sum(axis=1)[:, :1]


def scalars(x):
    return x.sum(axis=(1, 2))
"""


@pytest.mark.whole
def test_a_function_in_data_units_is_an_operator_and_the_file_repeats_the_posterior(exact, capsys):
    """The exact posterior, from the operator, noise and measurement in the file; channel 1 has another noise, two are inf."""
    root, _ = exact
    (root / "mine.py").write_text(KELVIN)
    noise = np.broadcast_to([6.0, 0.3], (4, 2)).copy()
    noise[0] = np.inf
    np.save(root / "noise.npy", noise)
    y = np.array([[np.nan, np.nan], [560.0, 30.0], [590.0, 28.0], [570.0, 29.0]])
    np.save(root / "y.npy", y)
    settings = {"task": "linear", "operator": f"{root / 'mine.py'}:kelvin", "image": str(root / "y.npy")}
    found = edited(exact, **settings, noise=str(root / "noise.npy"), num_samples=400)
    assert "from 400 training examples, by principal components" in (printed := capsys.readouterr().out)
    assert "Note: the operator adds a constant, from 32 to 32; it is subtracted from y." in printed
    assert "Residual" not in printed and found["residual"] == 0 and "(6 numbers)" in printed
    np.testing.assert_array_equal(found["noise"], noise.astype(np.float32))
    a, kept = found["operator"].reshape(8, 16), np.repeat(np.arange(4) > 0, 2)
    spread = np.tile(SCALE, 8)
    mean = np.tile(OFFSET, 8)
    prior = spread[:, None] * covariance(SHAPE) * spread
    a, difference = a[kept], (y - 32).ravel()[kept] - a[kept] @ mean
    gain = prior @ a.T @ np.linalg.inv(a @ prior @ a.T + np.diag(noise.ravel()[kept] ** 2))
    deviation = np.sqrt(np.diag(prior - gain @ a @ prior))
    z = (found["mean"].ravel() - mean - gain @ difference) / (deviation / np.sqrt(400))
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(found["deviation"].ravel() / deviation, 1, atol=0.15)
    # A covariance of the noise, which is not measured at the same entries.
    full = np.linalg.inv(np.linalg.inv(np.diag(np.where(kept, noise.ravel(), 1) ** 2)) + 0.02)
    np.save(root / "noise.npy", np.where(np.outer(kept, kept), full, np.inf))
    found = edited(exact, **settings, noise=str(root / "noise.npy"), num_samples=400)
    np.testing.assert_allclose(found["noise"][np.ix_(kept, kept)], full[np.ix_(kept, kept)], rtol=1e-6)
    np.testing.assert_allclose(found["measurement"], y, rtol=1e-5)
    matrix = a @ prior @ a.T + full[np.ix_(kept, kept)]
    gain = prior @ a.T @ np.linalg.inv(matrix)
    deviation = np.sqrt(np.diag(prior - gain @ a @ prior))
    z = (found["mean"].ravel() - mean - gain @ difference) / (deviation / np.sqrt(400))
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(found["deviation"].ravel() / deviation, 1, atol=0.15)
    residual = found["arr_0"].reshape(400, 16)[:, None] @ a.T
    residual = (y - 32).ravel()[kept] - residual[:, 0]
    weighted = residual @ np.linalg.inv(full[np.ix_(kept, kept)])
    np.testing.assert_allclose(found["chi_squared"], (residual * weighted).mean(axis=1), rtol=1e-2)
    np.save(root / "noise.npy", -np.triu(np.ones((8, 8))) + 2 * np.eye(8))
    with pytest.raises(errors.UserError, match="must be a covariance: symmetric, with eigenvalues above 0"):
        edited(exact, **settings, noise=str(root / "noise.npy"))
    for name, words in (
        ("rounds", "must be linear"),
        ("mixes", "must be linear row by row"),
        ("of_numpy", "no function of jax arrays"),
        ("missing", "cannot be imported"),
        ("scalars", "at least one number for each example"),
    ):
        with pytest.raises(errors.UserError, match=words) as caught:
            edited(exact, **settings | {"operator": f"{root / 'mine.py'}:{name}"}, noise=1.0)
        assert "\n" not in str(caught.value)
    found = edited(exact, task="linear", operator=f"{root / 'mine.py'}:totals", example=0, noise=5.0, num_samples=4)
    np.testing.assert_allclose(found["operator"][0], np.ones((8, 1)) * [1, 0], atol=1e-6)
    np.save(root / "none.npy", np.full(8, np.inf)[:, None])
    np.savez(root / "several.npz", a=np.ones(2))
    for noise in ("none.npy", "several.npz"):
        with pytest.raises(errors.UserError, match="must be standard deviations above 0, not all infinite"):
            edited(exact, task="deblur", example=0, noise=str(root / noise))


@pytest.mark.whole
def test_conditions_of_more_numbers_than_examples_are_summarized(tmp_path, capsys):
    """The condition is channel 0: of 20 examples, 5 components of its 8 numbers are used, and nothing fails."""
    config = exact_run(tmp_path, SHAPE, noise=0.3, count=20, is_field=True)
    found = covariance_of_data(config, pretrained.load(tmp_path / "run", network=True))
    assert "conditions have 8 numbers, so the regression is on 5 principal components" in capsys.readouterr().out
    variances = np.asarray(found.variances)
    assert np.isfinite(variances).all() and (variances >= 0).all() and variances.shape[0] <= 16


@pytest.mark.whole
def test_the_jacobian_has_a_residual_and_the_covariance_is_a_setting(exact, capsys):
    jacobian = {"task": "deblur", "blur": 1.5, "example": 0, "covariance": "jacobian"}
    found = edited(exact, **jacobian, noise=(0.5, 0.025), iterations=1)
    printed = capsys.readouterr().out
    assert found["residual"] > 0.05 and f"units of the noise: {found['residual']:.2g}." in printed
    assert "use more editing.iterations" in printed and "Covariance of x_0" not in printed
    np.testing.assert_allclose(found["noise"][0], [0.5, 0.025])
    found = edited(exact, **jacobian, noise=(0.5, 0.025), iterations=100)
    assert 0 < found["residual"] < 2e-3 and "use more" not in capsys.readouterr().out


@pytest.mark.whole
def test_a_held_out_example_is_measured_and_compared(exact, capsys):
    found = edited(exact, task="inpaint", example=3, mask=_mask(exact[0]), noise=0.1, num_samples=8)
    with np.load(exact[0] / "test.npz") as arrays:
        truth = arrays["x"][3]
    np.testing.assert_allclose(found["truth"], truth)
    known = np.arange(8) < 5
    z = (found["measurement"] - truth)[known] / 0.1
    assert 0.3 < z.std() < 2 and np.abs(z).max() < 4  # 10 draws of N(0, 1)
    again = edited(exact, task="inpaint", example=3, mask=_mask(exact[0]), noise=0.1, num_samples=8)
    np.testing.assert_array_equal(again["measurement"], found["measurement"])
    # Neighbors that differ by 40 deviations, which a smooth prior excludes
    rough = truth + 40 * SCALE * np.where(np.arange(8)[:, None] % 2, 1, -1)
    np.save(exact[0] / "rough.npy", rough)
    capsys.readouterr()
    edited(exact, task="inpaint", image=str(exact[0] / "rough.npy"), mask=_mask(exact[0]), noise=2.0, num_samples=2)
    assert "this model cannot explain the measurement with editing.noise=2" in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.parametrize("covariance", ["data", "jacobian"])
def test_another_measurement_compiles_nothing(exact, covariance, sampling_programs):
    root, config = exact
    config = config.copy_and_resolve_references()
    config.editing.update(task="inpaint", noise=0.5, covariance=covariance)
    config.sampling.update(sampler="ddpm", steps=4)
    net = pretrained.load(root / "run", network=True)
    setup, problem = resolve_sampling(config, net), Problem.from_config(config, net, np.arange(8)[:, None] < 5)
    problem = problem.with_covariance(covariance_of_data(config, net))
    assert problem.uses_data == (covariance == "data")
    y = problem.simulate(np.zeros((2, *SHAPE), np.float32), np.arange(2))
    first, second = (problem.draw(setup, each, 3, jax.random.key(0)) for each in (y, y + 1))
    assert sampling_programs() == 1 and (first[..., :5, :] != second[..., :5, :]).all()


def _mask(root):
    np.save(root / "mask.npy", np.arange(8) < 5)
    return str(root / "mask.npy")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("task", "method", "settings"),
    [
        ("super_resolution", None, {"factor": 2}),
        ("deblur", None, {"blur": 0.7, "covariance": "jacobian"}),
        ("fourier", None, {"share": 0.5}),
        ("super_resolution", None, {"factor": 2, "noise": 0.0}),  # projection
    ],
)
def test_every_task_and_method_runs_on_a_held_out_example(exact, task, method, settings):
    found = edited(exact, task=task, example=0, method=method, num_samples=4, **{"noise": 1.0, **settings})
    assert np.isfinite(found["arr_0"]).all() and found["arr_0"].shape == (4, *SHAPE)
    assert ("chi_squared" in found) == (settings.get("noise") != 0.0)
    if "chi_squared" not in found:  # exact: the means of pairs are the truth's
        with np.load(exact[0] / "test.npz") as arrays:
            means = arrays["x"][0].reshape(4, 2, 2).mean(axis=1)
        np.testing.assert_allclose(found["arr_0"].reshape(4, 4, 2, 2).mean(axis=2), np.stack([means] * 4), rtol=1e-4)


def problem(kind, task, **settings):
    """A problem for data with other offsets and scales in each channel."""
    config = array_config(
        kind, "unused.npz", **{"editing.task": task, **{f"editing.{k}": v for k, v in settings.items()}}
    )
    net = pretrained.from_config(config)
    offset, scale = 300.0 + np.arange(SHAPES[kind][-1]), 10.0 * np.arange(1, SHAPES[kind][-1] + 1)
    net = dataclasses.replace(net, normalizations={"x": Normalization(tuple(offset), tuple(scale))})
    return Problem.from_config(config, net), offset, scale


@pytest.mark.parametrize(
    ("kind", "task", "y_shape"),
    [
        ("series", "sparse", (2, 2)),
        ("field", "sparse", (12, 5)),
        ("volume", "sparse", (16, 1)),
        ("field", "deblur", (6, 8, 5)),
        ("field", "fourier", (6, 5, 5, 2)),
        ("volume", "super_resolution", (2, 2, 2, 1)),
    ],
)
def test_units_of_measurements(kind, task, y_shape):
    """A measurement in data units is the operator of an example in data units, and noise is scaled for each channel."""
    found, offset, scale = problem(kind, task, noise=3.0, blur=0.6 if task == "deblur" else 1.0, factor=2)
    assert found.y_shape == y_shape
    x = np.random.default_rng(0).standard_normal((2, *SHAPES[kind])).astype(np.float32)
    y, in_data = (np.asarray(found.operator.measure(each)) for each in (x, x * scale + offset))
    np.testing.assert_allclose(found.to_data(y), in_data, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.to_network(found.to_data(y)), y, atol=1e-5)
    simulated = np.stack([found.simulate(x[:1], np.array([i]))[0] for i in range(300)])
    noise = (found.to_data(simulated) - found.to_data(y[:1])).std(axis=0)
    np.testing.assert_allclose(noise.mean(), 3.0, rtol=0.05)
    assert noise.max() < 4  # every channel
    both = found.simulate(x, np.array([7, 8]))
    np.testing.assert_array_equal(both[1], found.simulate(x[1:], np.array([8]))[0])
    shown = found.show(found.to_data(y)[0])
    if task == "sparse":
        seen = np.isfinite(shown).all(axis=-1)
        assert seen.sum() == y_shape[0]
        np.testing.assert_allclose(shown[seen], (x * scale + offset)[0][seen], rtol=1e-5)
    elif task == "deblur":  # y has the blurred fields
        blurred = scipy.ndimage.gaussian_filter(x, (0, 0.6, 0.6, 0), truncate=3, mode="mirror")
        np.testing.assert_allclose(y, blurred, atol=1e-5)
    elif task == "fourier":
        whole, *_ = problem(kind, task, noise=3.0, share=1.0)
        y = whole.to_data(np.asarray(whole.operator.measure(x)))
        np.testing.assert_allclose(whole.show(y[0]), (x * scale + offset)[0], rtol=1e-4)
        again = found.operator.measure(((shown - offset) / scale)[None].astype(np.float32))
        np.testing.assert_allclose(again, found.operator.measure(x)[:1], atol=1e-4)  # also with lone coefficients
    elif task == "super_resolution":
        np.testing.assert_allclose(found.operator.measure(shown[None]), in_data[:1], rtol=1e-5)


def test_a_file_has_the_units_of_its_gray_levels(tmp_path, capsys):
    """A blur that halves gray levels, from a file of uint8 or of floats: the operator of the image in network units."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1)).astype(np.uint8)
    np.save(tmp_path / "kernel.npy", np.full((3, 3), 0.5 / 9))
    of_task = {"editing.task": "deblur", "editing.noise": 2.0, "editing.operator": str(tmp_path / "kernel.npy")}
    config = tiny_config(**of_task)
    net = pretrained.from_config(config)
    found = Problem.from_config(config, net)
    assert "Note: the kernel's sum is 0.5" in capsys.readouterr().out
    levels = np.round(np.asarray(found.operator.measure(image[None].astype(np.float32))))[0]
    Image.fromarray(levels[..., 0].astype(np.uint8)).save(tmp_path / "y.png")
    np.save(tmp_path / "bytes.npy", levels.astype(np.uint8))
    np.save(tmp_path / "floats.npy", levels)
    expected = found.operator.measure(image[None].astype(np.float32) / 127.5 - 1)
    for name in ("y.png", "bytes.npy", "floats.npy"):
        files = edit.EditFiles(tiny_config(**of_task, **{"editing.image": str(tmp_path / name)}), net)
        np.testing.assert_allclose(files.read_y(found, None), expected, atol=0.51 / 127.5)


def test_points_outside_of_the_grid_are_refused(tmp_path):
    np.save(tmp_path / "points.npy", np.array([[2.0, 8.0]]))
    config = tiny_config(
        **{"editing.task": "sparse", "editing.noise": 2.0, "editing.operator": str(tmp_path / "points.npy")}
    )
    with pytest.raises(errors.UserError, match="editing.operator=.* 1 of 1 points, such as"):
        Problem.from_config(config, pretrained.from_config(config))


def test_measured_gray_levels_may_be_floats(tmp_path):
    config = tiny_config(**{"editing.task": "colorize", "editing.noise": 2.0, "data.channels": 3})
    net = pretrained.from_config(config)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = []
    for dtype in (np.uint8, np.float32):
        np.save(tmp_path / "image.npy", image.astype(dtype))
        config.editing.image = str(tmp_path / "image.npy")
        found.append(edit.EditFiles(config, net).read_y(Problem.from_config(config, net), None))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_the_method_of_each_task():
    options = tiny_config().editing
    for task, noise, expected in (
        ("inpaint", 0, "repaint"),
        ("colorize", 0, "project"),
        ("super_resolution", 0, "project"),
        ("replace", 0, None),
        ("inpaint", 1, "mmps"),
        ("deblur", 1, "mmps"),
    ):
        options.update(task=task, noise=float(noise))
        assert edit_method(options) == expected


@pytest.mark.whole
def test_commands_that_do_not_fit_are_refused_in_one_line(exact):
    root, _ = exact
    np.save(root / "wrong.npy", np.zeros((3, 2)))
    y = str(root / "wrong.npy")
    for settings, words in (
        ({"task": "sparse", "noise": 1.0, "image": y}, "needs editing.operator=FILE.npy, where the file was measured"),
        ({"task": "sparse", "noise": 1.0, "image": y, "operator": y}, "points of 2 numbers need as many spatial axes"),
        ({"task": "deblur", "noise": 1.0, "image": y}, r"holds float64 \[3, 2\]; it must be .* shape \[8, 2\]"),
        ({"task": "deblur", "noise": 1.0, "image": y, "example": 1}, "exclude each other"),
        ({"task": "deblur", "noise": 1.0, "example": 9999}, "must be below 400"),
        (
            {"task": "deblur", "noise": 1.0, "example": 0, "num_samples": 1},
            "editing.num_samples=1 is too few for a standard deviation",
        ),
        ({"task": "super_resolution", "noise": 1.0, "example": 0, "factor": 3}, "factor=3 must divide"),
    ):
        with pytest.raises(errors.UserError, match=words) as caught:
            edited(exact, **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.whole
def test_noisy_images_are_measured_in_gray_levels(tmp_path):
    """From an image file, and from numbers in an .npy; the class must be one."""
    config = tiny_config(**{"diffusion.num_timesteps": 20, "model.num_classes": 10})
    found = Problem.from_config(experiment_with(config, task="deblur", noise=12.75), pretrained.from_config(config))
    np.testing.assert_allclose(found.noise, 0.1, rtol=1e-6)
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 1)).astype(np.uint8)
    Image.fromarray(levels[..., 0]).save(tmp_path / "y.png")
    np.save(tmp_path / "y.npy", levels.astype(float) + 0.25)
    for name, y in (("y.png", levels), ("y.npy", levels + 0.25)):
        options = experiment_with(config, task="deblur", noise=12.75, image=str(tmp_path / name))
        files = edit.EditFiles(options, pretrained.from_config(config))
        np.testing.assert_allclose(files.read_y(found, None)[0], y / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(to_gray_levels(np.array([-1.0, 1.0])), [0, 255])
    options = experiment_with(config, task="deblur", noise=1.0, image=str(tmp_path / "y.png"))
    with pytest.raises(errors.UserError, match="needs a single row of sampling.label, not 10"):
        edit.run(options, tmp_path / "none")


def experiment_with(config, **settings):
    config = config.copy_and_resolve_references()
    config.editing.update(**settings)
    return config
