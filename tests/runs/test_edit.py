"""--mode=edit: every task, against the core."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, editing, errors, guidance, pretrained, sampling, training
from diffusion_jax.runs import edit
from helpers.configs import DRAWN, T, classifier_config, conditional, tiny_config
from helpers.core_samples import agree, core_inputs
from helpers.work_directories import untrained


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


@pytest.mark.whole
@pytest.mark.parametrize("task", ["inpaint", "replace", "sdedit", "super_resolution", "interpolate"])
def test_every_editing_task_writes_a_picture_and_an_npz(root, files, task):
    directory = root / "conditional"
    overrides = {"editing.task": task, "editing.factor": 2, "sampling.label": 4}
    if task == "interpolate":
        overrides |= {"sampling.sampler": "ddim", "sampling.clip": False, "sampling.steps": None}
    edit.run(editing_config(files, **overrides), directory)
    (path,) = (directory / "samples" / "edits").glob(f"{task}_*.npz")
    with np.load(path) as arrays:
        images = arrays["arr_0"]
    assert path.with_suffix(".png").exists()
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    with Image.open(files / "image.png") as image:
        image = np.asarray(image)[..., None]
    if task in ("inpaint", "replace"):
        np.testing.assert_array_equal(images[:, 4:], np.repeat(image[None, 4:], 3, axis=0))
        assert (images[0, :4] != images[1, :4]).any()
    if task == "super_resolution":
        small = data.fit(Image.fromarray(image[..., 0]), (4, 4), 1)
        free = (images > 0) & (images < 255)  # what was cut off at the ends of the scale fits no longer
        whole = free.reshape(3, 4, 2, 4, 2).all(axis=(2, 4))
        means = images.reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
        assert abs(means - small[..., 0])[whole].max() <= 1 and whole.any()
    path.unlink()


@pytest.mark.whole
def test_edits_equal_those_of_the_core(root, files):
    """The label, the guidance by a classifier in both forms, and the options of each task, by hand."""
    directory = root / "conditional"
    walked, full, model, params = core_inputs(conditional(), directory)
    its = classifier_config(**{"diffusion.num_timesteps": T})
    classifier = training.model_from_config(its)
    guide = pretrained.load(root / "classifier").params
    y = jnp.full(3, 4)
    log_prob = guidance.class_log_prob(lambda x, time: classifier.apply({"params": guide}, x, time), y)
    plain = lambda x, time: model.apply({"params": params}, x, time, y)  # noqa: E731
    guided = guidance.classifier(plain, log_prob, full, 5.0)
    shift = guidance.log_prob_gradient(log_prob, 5.0)
    with Image.open(files / "image.png") as image, Image.open(files / "mask.png") as mask:
        x_0 = jnp.tile(jnp.float32(np.asarray(image))[None, ..., None] / 127.5 - 1, (3, 1, 1, 1))
        known = (np.asarray(mask) > 127)[..., None]
    key, small = jax.random.key(0), {"variance": "fixed_small"}
    tasks = {
        "sdedit": lambda network, sampler: editing.sdedit(key, walked, network, x_0, sampler, strength=0.7),
        "inpaint": lambda network, sampler: editing.repaint(
            key, walked, network, x_0, known, sampler, resamplings=3, jump=1
        ),
    }
    base = {"sampling.label": 4, "editing.strength": 0.7, "editing.resamplings": 3, "editing.jump": 1}
    by_classifier = base | {"sampling.classifier": str(root / "classifier"), "sampling.classifier_scale": 5.0}
    made = set()
    for task, run in tasks.items():
        for settings, network, sampler in (
            (base, plain, sampling.ddpm(**small)),
            (by_classifier, guided, sampling.ddpm(**small)),
            (by_classifier | {"sampling.classifier_form": "mean"}, plain, sampling.ddpm(mean_shift=shift, **small)),
        ):
            edit.run(editing_config(files, **{**settings, "editing.task": task}), directory)
            (path,) = set((directory / "samples" / "edits").glob(f"{task}_*.npz")) - made
            made.add(path)
            with np.load(path) as arrays:
                agree(arrays["arr_0"], jax.jit(lambda n=network, s=sampler, r=run: r(n, s))())
    for path in made:
        path.unlink()


@pytest.mark.whole
def test_invalid_editing_options_are_refused(root, files):
    for overrides, words in (
        ({"editing.task": "colorize"}, "needs a model of color images"),
        ({"editing.mask": ""}, "editing.mask=FILE is needed"),
        ({"editing.image": str(files)}, "cannot be read as an image"),
        ({"editing.mask": str(files / "black.png")}, "black everywhere: nothing is kept"),
        ({"editing.mask": str(files / "wide.png")}, "has 9x5 pixels and the image has 8x8"),
        ({"editing.task": "interpolate", "sampling.label": 3}, "only a deterministic sampler decodes"),
        ({"editing.task": "interpolate", "sampling.sampler": "ddim"}, "needs a single class: give sampling.class"),
        ({"editing.task": "super_resolution", "editing.factor": 3}, "must divide the model's 8x8 pixels"),
        (
            {"editing.task": "interpolate", "editing.level": 7, "sampling.label": 3},
            "level=7 must be an index of the steps, 0 ... 4",
        ),
    ):
        with pytest.raises(errors.UserError, match=words):
            edit.run(editing_config(files, **overrides), root / "conditional")


@pytest.mark.whole
def test_a_mask_of_zeros_and_ones_keeps_the_ones(root, files, capsys):
    """Saved as color; the console says how many pixels are kept."""
    with Image.open(files / "mask.png") as mask:
        Image.fromarray(np.stack([np.asarray(mask) // 255] * 3, -1)).save(files / "ones.png")
    config = editing_config(files, **{"editing.task": "replace", "editing.mask": str(files / "ones.png")})
    edit.run(config, root / "conditional")
    out = capsys.readouterr().out
    assert "The mask keeps 32 of 64 values (50%)" in out
    written = pathlib.Path(out.split("the results alone: ")[1].strip())
    with np.load(written) as arrays, Image.open(files / "image.png") as image:
        kept = arrays["arr_0"][:, 4:, :, 0]
        np.testing.assert_array_equal(kept, np.broadcast_to(np.asarray(image)[4:], kept.shape))


@pytest.mark.whole
def test_colorization_keeps_the_gray_values(tmp_path, files):
    config = tiny_config(**{"diffusion.num_timesteps": T, **DRAWN, "data.channels": 3})
    untrained(tmp_path / "run", config)
    config.editing.update(task="colorize", image=str(files / "image.png"), num_samples=2)
    edit.run(config, tmp_path / "run")
    (path,) = (tmp_path / "run" / "samples" / "edits").glob("colorize_*.npz")
    with np.load(path) as arrays:
        images = arrays["arr_0"].astype(int)
    with Image.open(files / "image.png") as image:
        gray = np.asarray(image).astype(int)
    inside = ((images > 0) & (images < 255)).all(-1)
    assert abs(images.mean(-1) - gray)[inside].max() <= 1 and (np.ptp(images, axis=-1) > 5).any()
