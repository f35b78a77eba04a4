"""--mode=sample: files, resuming, and classes."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import errors
from diffusion_jax.evaluation import image_sets
from diffusion_jax.runs import sample, train
from diffusion_jax.runs.batch_sampler import BatchSampler
from helpers.configs import tiny_config


@pytest.mark.whole
def test_sampling_writes_a_grid_and_an_npz(trained):
    sample.run(tiny_config(), trained)
    path = trained / "samples" / "step4_ema_ddpm2_seed0_n3"
    with np.load(f"{path}.npz") as arrays:
        assert arrays.files == ["arr_0", "settings"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    with Image.open(f"{path}.png") as picture:
        shown = np.asarray(picture)[-(2 * 68 + 4) :]  # below the title
        np.testing.assert_array_equal(shown[4:68:8, 4:68:8], images[0, :, :, 0])
    raw = tiny_config(
        **{"sampling.use_ema": False, "sampling.sampler": "ddim", "sampling.trajectory": 2, "sampling.steps": 2}
    )
    sample.run(raw, trained)
    (path,) = (trained / "samples").glob("step4_raw_ddim2_seed0_n3.npz")
    with np.load(path) as arrays:
        assert (arrays["arr_0"] != images).any()
    with Image.open(path.with_name(f"{path.stem}_trajectory.png")) as picture:
        width, height = picture.size
        assert width >= 2 * 68 + 4 and height > 14 + 4 * 68 + 4 and (height - 4 * 68 - 4) % 14 == 0
    with np.load(path.with_name(f"{path.stem}_trajectory.npz")) as frames:
        assert frames["x_t"].shape == frames["x_0"].shape == (1, 4, 8, 8, 1)
        assert frames["samples"].shape == (4, 8, 8, 1) and frames["times"].shape == (1,)
        assert frames["x_0"].dtype == np.uint8 and not np.array_equal(frames["x_t"], frames["x_0"])
    assert image_sets.open_image_set(str(trained)).name == str(path)  # not the trajectory, which is newer


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


@pytest.mark.whole
def test_a_conditional_run_samples_all_classes_in_turn(tmp_path):
    config = tiny_config(**{"model.num_classes": 10, "training.num_steps": 2})
    train.run(config, tmp_path)
    sample.run(config, tmp_path)
    with np.load(tmp_path / "samples" / "step2_ema_ddpm2_seed0_n3.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2]


def test_sampling_without_a_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="train first"):
        sample.run(tiny_config(), tmp_path)
    with pytest.raises(errors.UserError, match="num_samples=0"):
        sample.run(tiny_config(**{"sampling.num_samples": 0}), tmp_path)
