"""--mode=sample with classes, guidance, classifiers and upsamplers, against the core."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import Denoiser, errors, guidance, pretrained, sampling
from diffusion_jax.models import upsampling
from diffusion_jax.runs import sample, sampling_setup
from helpers.configs import DRAWN, T, conditional, upsampler_config
from helpers.core_samples import agree, core_inputs
from helpers.work_directories import take_arrays


def by_hand(network, walked, sampler, batches=2, size=4):
    """The same keys and batches through the core alone. network(batch) -> denoiser."""
    images = []
    for batch in range(batches):
        samples = range(batch * size, (batch + 1) * size)
        keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), i)) for i in samples]
        x_T = jnp.stack([jax.random.normal(key_noise, (8, 8, 1)) for key_noise, _ in keys])
        key_steps = jnp.stack([key_steps for _, key_steps in keys])
        images.append(jax.jit(lambda x, k=key_steps, b=batch: sampling.sample(k, walked, network(b), x, sampler))(x_T))
    return np.concatenate(images)


def drawn(directory):
    """(images, labels) of the only .npz, removed again."""
    arrays = take_arrays(directory / "samples", "step*.npz")
    return arrays["arr_0"], arrays.get("arr_1")


@pytest.mark.whole
def test_guided_samples_equal_those_of_the_core(root):
    """Two classes in turn, classifier-free guidance with an interval and a rescale, DPM-Solver++."""
    directory = root / "conditional"
    overrides = {
        "sampling.label": (3, 5),
        "sampling.guidance_scale": 2.5,
        "sampling.guidance_interval": (4, 15),
        "sampling.guidance_rescale": 0.5,
        "sampling.sampler": "dpm_solver_pp",
    }
    sample.run(conditional(**overrides), directory)
    images, labels = drawn(directory)
    np.testing.assert_array_equal(labels, [3, 5, 3, 5, 3, 5])
    walked, _, model, params = core_inputs(conditional(), directory)

    def network(batch):
        apply = lambda x, time, y: model.apply({"params": params}, x, time, y)  # noqa: E731
        y = jnp.array([3, 5, 3, 5])
        return guidance.classifier_free(apply, y, model.null_label, 2.5, interval=(4, 15), rescale=0.5)

    agree(images, by_hand(network, walked, sampling.dpm_solver_pp(2))[:6])


@pytest.mark.whole
@pytest.mark.parametrize(("form", "name"), [("mean", "plain"), ("eps", "conditional")])
def test_samples_guided_by_a_classifier_equal_those_of_the_core(root, form, name):
    directory = root / name
    classes = {} if name == "conditional" else {"model.num_classes": 0, "model.label_dropout": 0.0}
    options = {
        "sampling.classifier": str(root / "classifier"),
        "sampling.classifier_scale": 2.0,
        "sampling.classifier_form": form,
        "sampling.label": 7,
    }
    config = conditional(**classes, **options)
    sample.run(config, directory)
    images, labels = drawn(directory)
    np.testing.assert_array_equal(labels, [7] * 6)
    walked, _, model, params = core_inputs(conditional(**classes), directory)
    y = jnp.full(4, 7)
    log_prob = guidance.class_log_prob(pretrained.load(root / "classifier").logits, y)

    def network(batch):
        own = (y,) if name == "conditional" else ()
        apply = lambda x, time: model.apply({"params": params}, x, time, *own)  # noqa: E731
        return guidance.classifier(Denoiser(apply, variance="fixed_small"), log_prob, 2.0, form=form)

    agree(images, by_hand(network, walked, sampling.ddpm())[:6])


@pytest.mark.whole
def test_an_upsampler_enlarges_given_images(root, tmp_path):
    """Images from an .npz, repeated in order, and from a folder; noise on the small images; a trajectory."""
    directory = root / "upsampler"
    low = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "low.npz", low)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(low):
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    config = lambda **o: upsampler_config(**{**DRAWN, "diffusion.conditioning_noise": 0.2, **o})  # noqa: E731
    options = {"sampling.low_resolution_noise": 0.1, "sampling.sampler": "ddim"}
    sample.run(config(**{"sampling.low_resolution": str(tmp_path / "low.npz"), **options}), directory)
    images, _ = drawn(directory)
    walked, _, model, params = core_inputs(config(), directory)

    def network(batch):
        small = jnp.asarray(low[(4 * batch + np.arange(4)) % 3] / 127.5 - 1, jnp.float32)
        condition = upsampling.condition(small, (4, 8, 8, 1), jnp.full(4, 0.1))
        return lambda x, time: model.apply({"params": params}, x, time, condition=condition)

    agree(images, by_hand(network, walked, sampling.ddim())[:6])
    sample.run(config(**{"sampling.low_resolution": str(folder), "sampling.trajectory": 3, **options}), directory)
    np.testing.assert_array_equal(drawn(directory)[0], images)
    np.savez(tmp_path / "wrong.npz", low[:, :2])
    for path, words in (
        ("", "set sampling.low_resolution to an .npz"),
        (str(tmp_path / "none.npz"), "cannot be read as an .npy or .npz file"),
        (str(tmp_path / "wrong.npz"), r"holds uint8 \(3, 2, 4, 1\); this model enlarges uint8 images of 4x4"),
    ):
        wrong = config(**{"sampling.low_resolution": path})
        with pytest.raises(errors.UserError, match=words):
            sampling_setup.resolve_sampling(wrong, pretrained.from_config(wrong))


def of(settings, **diffusion):
    config = conditional(**{f"sampling.{setting}": value for setting, value in settings.items()})
    config.diffusion.update(diffusion)
    return sampling_setup.resolve_sampling(config, pretrained.from_config(config))


@pytest.mark.whole
def test_different_sampling_options_have_different_file_names(root):
    """A file name contains the sampler, the steps, the classes and the guidance; a digest represents all other options."""
    names = {
        "ddpm5_guided2.0": {"guidance_scale": 2.0},
        f"ddpm{T}": {"steps": None, "spacing": "karras"},
        "ddpm5_guided2.0000001": {"guidance_scale": 2.0000001},
        "ddim5_openai_class3-5": {"sampler": "ddim", "spacing": "openai", "label": (3, 5)},
    }
    for name, settings in names.items():
        assert sample._name_options(of(settings)) == name
    hashed = {
        sample._name_options(of(settings))
        for settings in (
            {"clip": "dynamic"},
            {"clip": "dynamic", "clip_quantile": 0.9},
            {"steps": (2, 3)},
            {"steps": (3, 2)},
            {"guidance_scale": 2.0, "guidance_interval": (1, 5)},
            {"label": tuple(range(10)) * 3 + (1,)},
            {"classifier": str(root / "classifier")},
            {"classifier": str(root / "classifier"), "classifier_form": "mean"},
        )
    }
    assert len(hashed) == 8 and all(len(name.split("_")[-1]) == 6 for name in hashed)


def test_the_clip_of_samples_is_the_setting():
    assert [of({"clip": clip}).options["clip"] for clip in (True, False)] == [True, False]
    assert callable(of({"clip": "dynamic"}).options["clip"])


def test_steps_on_which_a_sampler_fails_are_refused(capsys):
    """Without a spacing, heun, pndm and plms use a spacing that works; other steps that are known to fail raise a one-line
    error."""
    cosine = {"schedule": "cosine", "num_timesteps": 1000}
    for sampler in ("heun", "pndm", "plms"):
        chosen = of({"sampler": sampler, "steps": 20}, **cosine)
        assert chosen.schedule.num_timesteps == 20 and not capsys.readouterr().out
        with pytest.raises(errors.UserError, match="would be noise; use spacing='log_snr' or more steps"):
            of({"sampler": sampler, "steps": 20, "spacing": "trailing"}, **cosine)
    # Without a clip an eps network's errors grow, unless the steps are even in the log SNR, which is then the default.
    unclipped = of({"sampler": "ddim", "steps": 20, "clip": False}, **cosine)
    log_snr = of({"sampler": "ddim", "steps": 20, "clip": False, "spacing": "log_snr"}, **cosine)
    np.testing.assert_array_equal(unclipped.schedule.timesteps, log_snr.schedule.timesteps)
    capsys.readouterr()
    for settings in ({"steps": 20, "spacing": "trailing"}, {"steps": None}, {"steps": 5, "spacing": "log_snr"}):
        of({"sampler": "ddim", "clip": False, **settings}, **cosine)
        (note,) = capsys.readouterr().out.splitlines()
        advice = "more steps" if settings.get("spacing") == "log_snr" else "spacing='log_snr' or more steps"
        assert f"use {advice}, a clip for data in [-1, 1], or a network that predicts v" in note
    of({"sampler": "ddim", "steps": 20, "clip": False}, **cosine, prediction="v")
    assert not capsys.readouterr().out
    of({"sampler": "ddim", "steps": 5}, schedule="constant", num_timesteps=1000)
    words = "blurs the samples: they are 0.13 times as wide as the data; use spacing='log_snr' or more steps"
    assert words in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.label_dropout": 0.0, "sampling.guidance_scale": 2.0}, "needs a network trained with label_dropout"),
        ({"sampling.low_resolution_noise": 0.5}, "noise_std=0.5 must lie in 0 ... 0.0"),
        ({"sampling.steps": T + 1}, f"config.sampling: steps={T + 1}: "),
        ({"sampling.steps": 19, "sampling.spacing": "quadratic"}, "visits step 0 twice"),
        ({"sampling.classifier": "upsampler"}, "the classifier holds another network"),
        ({"sampling.classifier": "other_classifier"}, "another noise schedule"),
    ],
)
def test_invalid_combinations_of_options_are_refused(root, monkeypatch, overrides, words):
    monkeypatch.chdir(root)
    config = conditional(**overrides)
    with pytest.raises((errors.UserError, pretrained.PretrainedError), match=words) as caught:
        sampling_setup.resolve_sampling(config, pretrained.from_config(config))
    assert "\n" not in str(caught.value)
