"""--mode=sample: files, resuming, and classes."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import errors, schedules
from diffusion_jax.evaluation import example_sets
from diffusion_jax.runs import sample
from diffusion_jax.runs.sampling_setup import BatchSampler, picture_steps
from helpers.configs import conditional, tiny_config
from helpers.work_directories import untrained


@pytest.mark.whole
def test_sampling_writes_a_grid_and_an_npz(trained):
    sample.run(tiny_config(), trained)
    path = trained / "samples" / "step4_ema_ddpm2_seed0_n3"
    with np.load(f"{path}.npz") as arrays:
        assert arrays.files == ["arr_0", "settings"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    with Image.open(f"{path}.png") as picture:
        shown = np.asarray(picture)[-(2 * 100 + 4) :]  # below the title
        np.testing.assert_array_equal(shown[4:100:12, 4:100:12], images[0, :, :, 0])
    raw = tiny_config(
        **{"sampling.use_ema": False, "sampling.sampler": "ddim", "sampling.trajectory": 2, "sampling.steps": 2}
    )
    sample.run(raw, trained)
    (path,) = (trained / "samples").glob("step4_raw_ddim2_seed0_n3.npz")
    with np.load(path) as arrays:
        assert (arrays["arr_0"] != images).any()
    with np.load(path.with_name(f"{path.stem}_trajectory.npz")) as frames:
        assert frames["x_t"].shape == frames["x_0"].shape == (1, 2, 8, 8, 1)  # the first batch has two samples
        assert frames["samples"].shape == (2, 8, 8, 1) and frames["times"].shape == (1,)
        assert all(path.with_name(f"{path.stem}_trajectory{of}.png").exists() for of in ("", "_x_0"))
        assert frames["x_0"].dtype == np.uint8 and not np.array_equal(frames["x_t"], frames["x_0"])
    assert example_sets.open_image_set(str(trained)).name == str(path)  # not the trajectory, which is newer


def test_the_trajectory_is_of_the_first_samples(tmp_path):
    """The same noise and classes, also of a sampler that draws noise at every step, within a gray level of rounding."""
    config = conditional(
        **{
            "sampling.steps": 6,
            "sampling.sampler": "ddpm",
            "sampling.spacing": "log_snr",
            "sampling.trajectory": 12,
        }
    )
    file = sample.run(config, untrained(tmp_path / "run", config))
    with np.load(file.path) as arrays, np.load(file.path.with_name(f"{file.name}_trajectory.npz")) as frames:
        assert np.abs(arrays["arr_0"][:4].astype(int) - frames["samples"]).max() <= 1
        assert len(np.unique(arrays["arr_0"], axis=0)) == 6


@pytest.mark.parametrize(("steps", "spacing"), [(50, "trailing"), (None, None), (12, "log_snr")])
def test_the_columns_of_a_trajectory_change_alike(steps, spacing):
    """Neighbors differ by at most a tenth more than an even share of the signal, or are neighbors among the steps."""
    schedule = schedules.from_betas(schedules.betas("cosine", 1000))
    schedule = schedule if steps is None else schedules.respace(schedule, steps, spacing=spacing)
    found = picture_steps(schedule, 11)
    assert found[-1] == schedule.num_timesteps - 1 and (np.diff(found) > 0).all() and 3 < len(found) <= 11
    change = -np.diff(np.append(1.0, schedule.alpha_bar[found]))
    assert ((change[1:] < 2 / 11) | (np.diff(found) == 1)).all()
    assert (schedule.alpha_bar[found] < 0.05).sum() <= 2  # columns of noise
    assert picture_steps(schedule, 1).tolist() == [schedule.num_timesteps - 1]


@pytest.mark.whole
def test_interrupted_sampling_resumes(trained, monkeypatch):
    config = tiny_config(**{"sampling.num_samples": 7, "sampling.seed": 3})
    whole = trained / "samples" / "step4_ema_ddpm2_seed3_n7.npz"
    sample.run(config, trained)
    with np.load(whole) as arrays:
        expected = arrays["arr_0"]
    whole.unlink()
    made = []
    draw = BatchSampler.__call__

    def third_breaks(self, *args):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(BatchSampler, "__call__", third_breaks)
    with pytest.raises(KeyboardInterrupt):
        sample.run(config, trained)
    monkeypatch.undo()
    (torn,) = (p for p in (trained / "samples").iterdir() if p.name.startswith("."))
    (torn / "2.partial.npz").write_bytes(b"killed while writing")
    monkeypatch.setattr(BatchSampler, "__call__", lambda self, *args: made.append(1) or draw(self, *args))
    sample.run(config, trained)
    assert len(made) == 5  # two before, the broken one, and the two that were left
    with np.load(whole) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert not [p for p in (trained / "samples").iterdir() if p.name.startswith(".")]


def test_sampling_without_a_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="train first"):
        sample.run(tiny_config(), tmp_path)
    with pytest.raises(errors.UserError, match="num_samples=0"):
        sample.run(tiny_config(**{"sampling.num_samples": 0}), tmp_path)
