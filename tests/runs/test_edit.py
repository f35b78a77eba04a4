"""--mode=edit: every task, against the core."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import Denoiser, data, editing, errors, guidance, pretrained, sampling
from diffusion_jax.runs import edit
from helpers.configs import DRAWN, T, conditional, tiny_config
from helpers.core_samples import agree, core_inputs
from helpers.work_directories import take_arrays, untrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    images = data.load(tiny_config().data).read(np.arange(2))["image"]
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4] = 0
    for name, image in {
        "image": images[0, ..., 0],
        "other": images[1, ..., 0],
        "mask": mask,
        "black": mask & 0,
        "wide": np.zeros((5, 9), np.uint8),
    }.items():
        Image.fromarray(image).save(directory / f"{name}.png")
    return directory


def editing_config(files, **overrides):
    named = {f"editing.{setting}": str(files / f"{setting}.png") for setting in ("image", "other", "mask")}
    return conditional(**{"editing.num_samples": 3, "editing.resamplings": 2, "editing.jump": 2, **named, **overrides})


def edited(directory, config):
    """Runs an edit; returns the results."""
    edit.run(config, directory)
    return take_arrays(directory / "samples" / "edits", has_picture=True)["arr_0"]


@pytest.mark.whole
def test_known_pixels_and_measurements_are_kept(root, files):
    options = {"editing.task": "replace", "editing.factor": 2, "sampling.label": 4}
    images = edited(root / "conditional", editing_config(files, **options))
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    with Image.open(files / "image.png") as image:
        image = np.asarray(image)
    np.testing.assert_array_equal(images[:, 4:, :, 0], np.repeat(image[None, 4:], 3, axis=0))
    assert (images[0, :4] != images[1, :4]).any()
    images = edited(root / "conditional", editing_config(files, **options | {"editing.task": "super_resolution"}))
    small = data.fit(Image.fromarray(image), (4, 4), 1)
    free = (images > 0) & (images < 255)  # clipping changes the means
    whole = free.reshape(3, 4, 2, 4, 2).all(axis=(2, 4))
    means = images.reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
    assert abs(means - small[..., 0])[whole].max() <= 1 and whole.any()


@pytest.mark.whole
def test_edits_equal_those_of_the_core(root, files):
    """The label, both forms of classifier guidance, and each task's options, by hand."""
    walked, _, model, params = core_inputs(conditional(), root / "conditional")
    classifier, y = pretrained.load(root / "classifier"), jnp.full(3, 4)
    log_prob = guidance.class_log_prob(classifier.logits, y)
    plain = Denoiser(lambda x, time: model.apply({"params": params}, x, time, y), variance="fixed_small")
    guided = {form: guidance.classifier(plain, log_prob, 5.0, form=form) for form in ("eps", "mean")}
    with Image.open(files / "image.png") as image, Image.open(files / "mask.png") as mask:
        x_0 = jnp.tile(jnp.float32(np.asarray(image))[None, ..., None] / 127.5 - 1, (3, 1, 1, 1))
        known = (np.asarray(mask) > 127)[..., None]
    (_, key), ddpm = jax.random.split(jax.random.key(0)), sampling.ddpm()
    options = {"sampling.label": 4, "editing.strength": 0.7, "editing.resamplings": 3, "editing.jump": 1}
    options |= {"sampling.classifier": str(root / "classifier"), "sampling.classifier_scale": 5.0}
    for task, form, run in (
        ("sdedit", "eps", lambda: editing.sdedit(key, walked, guided["eps"], x_0, ddpm, strength=0.7)),
        (
            "inpaint",
            "mean",
            lambda: editing.repaint(key, walked, guided["mean"], x_0, known, ddpm, resamplings=3, jump=1),
        ),
    ):
        config = editing_config(files, **options, **{"editing.task": task, "sampling.classifier_form": form})
        agree(edited(root / "conditional", config), jax.jit(run)())


@pytest.mark.whole
def test_invalid_editing_options_are_refused(root, files):
    for overrides, words in (
        ({"editing.task": "colorize"}, "needs a model of color images"),
        ({"editing.mask": ""}, "editing.mask=FILE is needed"),
        ({"editing.image": str(files)}, "cannot be read as an image"),
        ({"editing.mask": str(files / "black.png")}, "black everywhere: nothing is kept"),
        ({"editing.mask": str(files / "wide.png")}, "has 9x5 pixels and the image has 8x8"),
        ({"editing.task": "interpolate", "sampling.label": 3}, "only a deterministic sampler decodes"),
        ({"editing.task": "interpolate", "sampling.sampler": "ddim"}, "needs a single row of sampling.label, not 10"),
        ({"editing.task": "super_resolution", "editing.factor": 3}, "must divide the model's 8x8 pixels"),
        (
            {"editing.task": "interpolate", "editing.level": 7, "sampling.label": 3},
            "level, an index of the steps .*, got 7",
        ),
    ):
        with pytest.raises(errors.UserError, match=words):
            edit.run(editing_config(files, **overrides), root / "conditional")


def test_a_mask_of_zeros_and_ones_keeps_the_ones(files, capsys):
    """The mask is saved in color; the console shows how many pixels are kept."""
    with Image.open(files / "mask.png") as mask:
        Image.fromarray(np.stack([np.asarray(mask) // 255] * 3, -1)).save(files / "ones.png")
    config = editing_config(files, **{"editing.mask": str(files / "ones.png")})
    known = edit.EditFiles(config, pretrained.from_config(config)).read_mask()
    assert known[4:].all() and not known[:4].any()
    assert "The mask keeps 32 of 64 values (50%)" in capsys.readouterr().out


@pytest.mark.whole
def test_colorization_keeps_the_gray_values(tmp_path, files):
    config = tiny_config(**{"diffusion.num_timesteps": T, **DRAWN, "data.channels": 3})
    untrained(tmp_path / "run", config)
    config.editing.update(task="colorize", image=str(files / "image.png"), num_samples=2)
    images = edited(tmp_path / "run", config).astype(int)
    with Image.open(files / "image.png") as image:
        gray = np.asarray(image).astype(int)
    inside = ((images > 0) & (images < 255)).all(-1)
    assert abs(images.mean(-1) - gray)[inside].max() <= 1 and (np.ptp(images, axis=-1) > 5).any()
