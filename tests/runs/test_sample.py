"""--mode=sample: the sample files, which are reused or drawn again, and resuming."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import errors, schedules
from diffusion_jax.evaluation import features
from diffusion_jax.provenance import Provenance, params_digest
from diffusion_jax.runs import sample
from diffusion_jax.runs.sample import picture_steps
from diffusion_jax.runs.sampling_setup import SamplingSetup
from helpers.configs import FEW_DRAWN, conditional, convolutions_config
from helpers.work_directories import reuse_or_draw, untrained


@pytest.mark.whole
def test_sampling_writes_a_grid_and_an_npz(trained):
    sample.run(convolutions_config(), trained)
    path = trained / "samples" / "step4_ema_ddpm2_seed0_n3"
    with np.load(f"{path}.npz") as arrays:
        assert arrays.files == ["arr_0", "provenance"]
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    with Image.open(f"{path}.png") as picture:
        shown = np.asarray(picture)[-(100 + 4) :, -(3 * 100 + 4) :]  # a row of three below the title
        np.testing.assert_array_equal(shown[4:100:12, 4:100:12], images[0, :, :, 0])
    sample.run(convolutions_config(**{"sampling.files": "png"}), trained)
    single = [np.asarray(Image.open(trained / "images" / path.name / f"{i:05d}.png")) for i in range(3)]
    np.testing.assert_array_equal(single, images[..., 0])
    raw = convolutions_config(
        **{"sampling.use_ema": False, "sampling.sampler": "ddim", "sampling.trajectory": 2, "sampling.steps": 2}
    )
    sample.run(raw, trained)
    (path,) = (trained / "samples").glob("step4_raw_ddim2_seed0_n3.npz")
    with np.load(path) as arrays:
        assert (arrays["arr_0"] != images).any()
    trajectory = path.parent / "trajectories" / path.name
    with np.load(trajectory) as frames:
        assert frames["x_t"].shape == frames["x_0"].shape == (1, 2, 8, 8, 1)  # the first batch has two samples
        assert frames["samples"].shape == (2, 8, 8, 1) and frames["times"].shape == (1,)
        assert all(trajectory.with_name(f"{path.stem}{of}.png").exists() for of in ("", "_x_0"))
        assert frames["x_0"].dtype == np.uint8 and not np.array_equal(frames["x_t"], frames["x_0"])
    assert features.open_set(str(trained)).name == str(path)  # not the newer trajectory


@pytest.mark.whole
def test_the_trajectory_is_of_the_first_samples(tmp_path):
    """The same noise and classes, also for a sampler that draws noise at every step, up to one gray level of rounding."""
    settings = {"sampling.steps": 6, "sampling.sampler": "ddpm", "sampling.spacing": "log_snr"}
    config = conditional(**settings, **{"sampling.trajectory": 12})
    file = sample.run(config, untrained(tmp_path / "run", config))
    with np.load(file.path) as arrays, np.load(file.path.parent / "trajectories" / file.path.name) as frames:
        assert np.abs(arrays["arr_0"][:4].astype(int) - frames["samples"]).max() <= 1
        assert len(np.unique(arrays["arr_0"], axis=0)) == 6


@pytest.mark.parametrize(("steps", "spacing"), [(50, "trailing"), (None, None), (12, "log_snr")])
def test_the_columns_of_a_trajectory_change_alike(steps, spacing):
    """Neighbors differ by at most two tenths more than an even share of the log SNR, or are neighbors among the steps."""
    schedule = schedules.from_betas(schedules.betas("cosine", 1000))
    schedule = schedule if steps is None else schedules.respace(schedule, steps, spacing=spacing)
    found = picture_steps(schedule, 11)
    assert found[-1] == schedule.num_timesteps - 1 and (np.diff(found) > 0).all() and 3 < len(found) <= 11
    log_snr = np.log(schedule.snr[found[:-1]])
    assert -7 < log_snr[-1] < -4 and 1 < log_snr[0] < 4
    assert ((-np.diff(log_snr) < 1.2 * 8 / 9) | (np.diff(found[:-1]) == 1)).all()
    assert picture_steps(schedule, 1).tolist() == [schedule.num_timesteps - 1]


@pytest.mark.whole
def test_interrupted_sampling_resumes(trained, monkeypatch):
    config = convolutions_config(**{"sampling.num_samples": 7, "sampling.seed": 3})
    whole = trained / "samples" / "step4_ema_ddpm2_seed3_n7.npz"
    sample.run(config, trained)
    with np.load(whole) as arrays:
        expected = arrays["arr_0"]
    whole.unlink()
    made = []
    draw = SamplingSetup.generate_batch

    def third_breaks(*args):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(SamplingSetup, "generate_batch", third_breaks)
    with pytest.raises(KeyboardInterrupt):
        sample.run(config, trained)
    monkeypatch.undo()
    (torn,) = (p for p in (trained / "samples").iterdir() if p.name.startswith("."))
    (torn / "2.partial.npz").write_bytes(b"killed while writing")
    monkeypatch.setattr(SamplingSetup, "generate_batch", lambda *args: made.append(1) or draw(*args))
    sample.run(config, trained)
    assert len(made) == 5  # two before, the failed batch, and the two remaining batches
    with np.load(whole) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert not [p for p in (trained / "samples").iterdir() if p.name.startswith(".")]


def test_sampling_without_a_run_is_refused(tmp_path):
    with pytest.raises(errors.PretrainedError, match="train first"):
        sample.run(convolutions_config(), tmp_path)
    with pytest.raises(errors.UserError, match="num_samples=0"):
        sample.run(convolutions_config(**{"sampling.num_samples": 0}), tmp_path)


@pytest.mark.whole
@pytest.mark.usefixtures("own_cache")
def test_samples_are_reused_unless_a_setting_differs(run, drawn, capsys):
    """Files with the same name: other settings, other weights from the same step, and a corrupted file."""
    file = reuse_or_draw(convolutions_config(**FEW_DRAWN), run)
    assert len(drawn) == 3
    for free in ({}, {"sampling.trajectory": 3, "sampling.preview_steps": 7}, {"data.workers": 3}):
        reuse_or_draw(convolutions_config(**FEW_DRAWN | free), run)
    assert len(drawn) == 3 and "Sampling again" not in capsys.readouterr().out
    for damage, words in (
        (lambda: store_settings(file.path, num_steps=3), "other settings (num_steps: 3 there, 2 here)."),
        (lambda: store_settings(file.path, weights_digest="1" * 64), "other settings (weights_digest: '111"),
        (lambda: file.path.write_bytes(b"PK\x03\x04 torn"), "does not store the settings"),
        (lambda: change_arrays(file.path, lambda arrays: {"arr_0": arrays["arr_0"]}), "does not store the settings"),
        (lambda: store_record(file.path, arrays_sha256=None), "and the digest of its samples"),
    ):
        damage()
        del drawn[:]
        reuse_or_draw(convolutions_config(**FEW_DRAWN), run)
        out = capsys.readouterr().out
        assert len(drawn) == 3 and f"Sampling again: {file.path} " in out and words in out
        assert Provenance.read(file.path).digest == file.provenance.digest
    for change in (
        lambda arrays: {"arr_0": arrays["arr_0"] + 1},
        lambda arrays: {"arr_0": arrays["arr_0"][:-1]},
        lambda arrays: {"arr_1": np.zeros(20)},
    ):
        change_arrays(file.path, lambda arrays, change=change: arrays | change(arrays))
        with pytest.raises(errors.UserError, match=rf"^{file.path} was changed .*: rm {file.path}$"):
            reuse_or_draw(convolutions_config(**FEW_DRAWN), run)
        del drawn[:]
        sample.run(convolutions_config(**FEW_DRAWN), run)  # --mode=sample never reuses a file
        assert len(drawn) == 3
    reuse_or_draw(convolutions_config(**FEW_DRAWN), run)
    assert len(drawn) == 3 and f"Using the samples in {file.path}." in capsys.readouterr().out


def change_arrays(path, change):
    """Replaces the arrays of a file by a function of them, without a new digest."""
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **change(content))


def store_record(path, **fields):
    """Replaces fields of a file's record."""
    record = dataclasses.asdict(Provenance.read(path)) | fields
    change_arrays(path, lambda arrays: arrays | {"provenance": np.array(json.dumps(record))})


def store_settings(path, **settings):
    """Replaces settings in a file's record."""
    store_record(path, settings=Provenance.read(path).settings | settings)


def test_the_digest_of_parameters_depends_on_names_shapes_types_and_values():
    kernel = np.arange(6.0).reshape(2, 3)
    tree = {"a": {"kernel": kernel}, "b": np.float32(3)}
    assert params_digest(tree) == params_digest({"b": np.float32(3), "a": {"kernel": kernel.copy()}})
    for other in ({"b": np.float32(4)}, {"b": np.float64(3)}, {"a": {"kernel": kernel.T}}, {"a": {"scale": kernel}}):
        assert params_digest(tree | other) != params_digest(tree)
