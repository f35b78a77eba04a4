"""--mode=edit on data that are not images: array files, results in data units, conditions."""

import numpy as np
import pytest

from diffusion_jax import data, errors, pretrained
from diffusion_jax.runs import edit
from helpers.array_configs import SHAPES, array_config, examples, write_arrays
from helpers.work_directories import take_arrays, untrained

BASE = {
    "model.condition_features": 1,
    "model.condition_dropout": 0.25,
    "sampling.sampler": "ddim",
    "diffusion.num_timesteps": 20,
    "editing.num_samples": 2,
    "editing.resamplings": 2,
    "editing.jump": 1,
}
CONDITION = np.linspace(-3, 5, 24)[:, None]


def known_values(kind):
    """bool [*spatial, C]: the first half of the first axis."""
    known = np.zeros(SHAPES[kind], bool)
    known[: len(known) // 2] = True
    return known


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Directories by kind, made when first needed: an untrained run with conditions, and files for edits."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = root = tmp_path_factory.mktemp(kind)
            config = array_config(kind, write_arrays(kind, root / "data.npz", condition=CONDITION), **BASE)
            untrained(root / "run", config, data.load(config.data))
            first, second = examples(kind, 2, seed=1)
            known = known_values(kind)
            mask = known if kind == "vectors" else known[..., 0]
            holes = np.where(known, 1e-5 * first, np.nan)  # far below the rounding of 300, the data's mean
            for name, array in {"image": first, "other": second, "mask": mask, "holes": holes}.items():
                np.save(root / f"{name}.npy", array)
            np.save(root / "two.npy", [[2.0], [3.0]])
            np.save(root / "one.npy", [[2.0]])
        return made[kind]

    return get


def configured(kind, root, task, **overrides):
    files = {f"editing.{setting}": str(root / f"{setting}.npy") for setting in ("image", "other", "mask")}
    conditions = {"sampling.conditions": str(root / "two.npy"), "editing.task": task}
    return array_config(kind, root / "data.npz", **{**BASE, **files, **conditions, **overrides})


def results(config, root):
    edit.run(config, root / "run")
    x = take_arrays(root / "run" / "samples" / "edits", has_picture=True)["arr_0"]
    assert x.dtype == np.float32 and np.isfinite(x).all()
    return x


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "task"),
    [("vectors", "inpaint"), ("volume", "replace")],
)
def test_inpainting_returns_the_known_numbers_of_the_file(roots, kind, task, capsys):
    """Known values are returned exactly, and unknown values may be NaN in the file."""
    root, known = roots(kind), known_values(kind)
    holes = np.load(root / "holes.npy")
    x = results(configured(kind, root, task, **{"editing.image": str(root / "holes.npy")}), root)
    assert x.shape == (2, *SHAPES[kind])
    for row in x:
        np.testing.assert_array_equal(row[known], holes[known].astype(np.float32))
    assert (x[0][~known] != x[1][~known]).all()
    assert f"The mask keeps {known.sum()} of {known.size} values" in capsys.readouterr().out


@pytest.mark.whole
def test_interpolation_starts_and_ends_near_the_given_vectors(roots):
    root = roots("vectors")
    options = {
        "sampling.steps": None,
        "editing.level": 0,
        "editing.num_samples": 3,
        "sampling.conditions": str(root / "one.npy"),
    }
    x = results(configured("vectors", root, "interpolate", **options), root)
    first, second = np.load(root / "image.npy"), np.load(root / "other.npy")
    deviation = examples("vectors").std(axis=0)
    # At index 0 of 20 steps the noise is below 0.02 of the data's deviation, and the mean is linear.
    for row, expected in zip(x, (first, (first + second) / 2, second), strict=True):
        np.testing.assert_allclose(row / deviation, expected / deviation, atol=0.2)


@pytest.mark.whole
def test_files_and_tasks_that_do_not_fit_are_refused_in_one_line(roots, monkeypatch):
    root = roots("series")
    monkeypatch.chdir(root)
    np.save("wide.npy", np.zeros((9, 2)))
    np.savez("several.npz", np.zeros((8, 2)))
    np.save("numbers.npy", np.ones(8))
    np.save("all.npy", np.ones(8, bool))
    for task, overrides, words in (
        ("sdedit", {"editing.image": "several.npz"}, "holds several arrays; save the one to use with np.save"),
        ("sdedit", {"editing.image": "wide.npy"}, r"holds float64 \[9, 2\]; it must be .* with shape \[8, 2\]"),
        ("sdedit", {"editing.image": "holes.npy"}, "editing.image=.*not finite"),
        ("interpolate", {}, "needs a single row of sampling.conditions, not 2"),
        ("inpaint", {"editing.mask": "numbers.npy"}, r"holds float64 \[8\]; it must be bool of shape \[8, 2\] or"),
        ("inpaint", {"editing.mask": "all.npy"}, "is True everywhere: nothing is left"),
        ("tomography", {"editing.noise": 1.0, "sampling.conditions": "one.npy"}, "radon takes square images"),
    ):
        with pytest.raises(errors.UserError, match=words) as caught:
            edit.run(configured("series", root, task, **overrides), root / "run")
        assert "\n" not in str(caught.value)
    config = configured("series", root, "sdedit", **{"data.normalization": "limits", "data.limits": (0.0, 1.0)})
    with pytest.raises(errors.UserError, match=r"from .* to .*, outside data.limits=\(0.0, 1.0\)"):
        edit.EditFiles(config, pretrained.from_config(config)).read("image")
