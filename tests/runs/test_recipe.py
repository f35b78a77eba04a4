"""--mode=sample and --mode=edit: classes, guidance, classifiers, upsamplers and edits of tiny networks, against the core."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import data, editing, errors, guidance, pretrained, process, sampling, schedules, training
from diffusion_jax.images import to_uint8
from diffusion_jax.models import upsampling
from diffusion_jax.runs import edit, sample, sampler_config, sampling_setup, trained_model
from helpers.configs import DRAWN, T, classifier_config, conditional, tiny_config, upsampler_config
from helpers.program import finish, start
from helpers.work_directories import untrained


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    untrained(root / "conditional", conditional())
    untrained(root / "plain", tiny_config(**{"diffusion.num_timesteps": T, **DRAWN}))
    untrained(root / "classifier", classifier_config(**{"diffusion.num_timesteps": T}))
    untrained(root / "other_classifier", classifier_config(**{"diffusion.num_timesteps": 2 * T}))
    untrained(root / "upsampler", upsampler_config(**DRAWN, **{"diffusion.conditioning_noise": 0.2}))
    return root


def parts_of(config, directory, steps=5, spacing="trailing"):
    """(schedule to walk, whole schedule, apply(x, time, *y)) of a work directory."""
    built = training.setup(config)
    _, params = trained_model.load_weights(config, directory, built.model, built.mesh, True)
    return schedules.respace(built.schedule, steps, spacing), built.schedule, built.model, params


def by_hand(network, walked, sampler, batches=2, size=4):
    """The same keys and batches through the core alone. network(batch) -> denoise_fn."""
    images = []
    for batch in range(batches):
        key_noise, key_steps = jax.random.split(jax.random.fold_in(jax.random.key(0), batch))
        x_T = jax.random.normal(key_noise, (size, 8, 8, 1))
        images.append(
            jax.jit(lambda x, k=key_steps, b=batch: sampling.sample(k, walked, network(b), x, sampler(b)))(x_T)
        )
    return np.concatenate(images)


def drawn(directory):
    """(images, labels) of the newest .npz, removed again."""
    (path,) = (directory / "samples").glob("step*.npz")
    with np.load(path) as arrays:
        found = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else None
    path.unlink()
    return found


def agree(images, x, distinct=20):
    """uint8 images and what they were made from, but for the rounding of values half-way."""
    assert abs(images.astype(int) - np.asarray(to_uint8(x)).astype(int)).max() <= 1
    assert len(np.unique(images)) > distinct


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
    walked, _, model, params = parts_of(conditional(), directory)

    def network(batch):
        apply = lambda x, time, y: model.apply({"params": params}, x, time, y)  # noqa: E731
        y = jnp.array([3, 5, 3, 5])
        return guidance.classifier_free(apply, y, model.null_label, 2.5, interval=(4, 15), rescale=0.5)

    agree(images, by_hand(network, walked, lambda batch: sampling.dpm_solver_pp(2))[:6])
    sample.run(conditional(**{**overrides, "sampling.guidance_scale": 1.0}), directory)
    unguided, _ = drawn(directory)
    assert (unguided != images).any()


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({"sampler": "pndm"}, sampling.pndm()),
        ({"sampler": "heun", "churn": 2.0}, sampling.heun(churn=2.0)),
    ],
)
def test_samplers_that_call_the_network_between_steps_work(root, options, sampler):
    """These ask at times that no table of the steps' times holds."""
    base = {"diffusion.num_timesteps": T, **DRAWN, "sampling.steps": 8}
    sample.run(tiny_config(**base, **{f"sampling.{leaf}": value for leaf, value in options.items()}), root / "plain")
    images, _ = drawn(root / "plain")
    walked, _, model, params = parts_of(tiny_config(**base), root / "plain", 8, "log_snr")  # what suits these samplers
    network = lambda batch: lambda x, time: model.apply({"params": params}, x, time)  # noqa: E731
    agree(images, by_hand(network, walked, lambda batch: sampler)[:6], distinct=10)  # most are clipped


@pytest.mark.whole
@pytest.mark.parametrize(("form", "name"), [("mean", "plain"), ("eps", "conditional")])
def test_samples_guided_by_a_classifier_equal_those_of_the_core(root, form, name):
    directory = root / name
    base = (
        conditional
        if name == "conditional"
        else lambda **o: tiny_config(**{"diffusion.num_timesteps": T, **DRAWN, **o})
    )
    config = base(
        **{
            "sampling.classifier": str(root / "classifier"),
            "sampling.classifier_scale": 2.0,
            "sampling.classifier_form": form,
            "sampling.label": 7,
        }
    )
    sample.run(config, directory)
    images, labels = drawn(directory)
    np.testing.assert_array_equal(labels, [7] * 6)
    walked, full, model, params = parts_of(base(), directory)
    its = classifier_config(**{"diffusion.num_timesteps": T})
    classifier = training.model_from_config(its)
    _, guide = trained_model.load_weights(its, root / "classifier", classifier, training.setup(its).mesh, True)
    y = jnp.full(4, 7)
    log_prob = guidance.class_log_prob(lambda x, time: classifier.apply({"params": guide}, x, time), y)

    def network(batch):
        own = (y,) if name == "conditional" else ()
        apply = lambda x, time: model.apply({"params": params}, x, time, *own)  # noqa: E731
        return guidance.classifier(apply, log_prob, full, 2.0) if form == "eps" else apply

    shift = guidance.log_prob_gradient(log_prob, 2.0) if form == "mean" else None
    agree(images, by_hand(network, walked, lambda batch: sampling.ddpm(variance="fixed_small", mean_shift=shift))[:6])


def test_an_upsampler_enlarges_given_images(root, tmp_path):
    """Images of an .npz in turn, and of a folder; the noise it is told of; a trajectory."""
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
    walked, _, model, params = parts_of(config(), directory)

    def network(batch):
        small = jnp.asarray(low[(4 * batch + np.arange(4)) % 3] / 127.5 - 1, jnp.float32)
        return lambda x, time: model.apply(
            {"params": params}, upsampling.condition(x, small, jnp.full(x.shape[0], 0.1)), time
        )

    agree(images, by_hand(network, walked, lambda batch: sampling.ddim())[:6])
    sample.run(config(**{"sampling.low_resolution": str(folder), "sampling.trajectory": 3, **options}), directory)
    np.testing.assert_array_equal(drawn(directory)[0], images)
    np.savez(tmp_path / "wrong.npz", low[:, :2])
    np.savez(tmp_path / "empty.npz", low[:0])
    for path, words in (
        ("", "name them by sampling.low_resolution"),
        (str(tmp_path / "none.npz"), "neither a folder nor an .npz"),
        (str(tmp_path / "empty.npz"), "holds no images"),
        (str(tmp_path / "wrong.npz"), r"holds uint8 \(3, 2, 4, 1\); this model enlarges uint8 images of 4x4"),
    ):
        with pytest.raises(errors.UserError, match=words):
            sample.run(config(**{"sampling.low_resolution": path}), directory)


OPTIONS = {  # every option of every sampler, off its usual value
    "ddpm": ({}, lambda **k: sampling.ddpm(**k)),
    "ddim": ({"eta": 0.5}, lambda **k: sampling.ddim(0.5, **k)),
    "euler": ({}, lambda **k: sampling.euler(**k)),
    "euler_ancestral": ({}, lambda **k: sampling.euler_ancestral(**k)),
    "heun": (
        {"churn": 5.0, "churn_range": (0.1, 20), "churn_noise": 1.2},
        lambda **k: sampling.heun(churn=5.0, churn_range=(0.1, 20), churn_noise=1.2, **k),
    ),
    "dpm_solver_pp": (
        {"order": 3, "sde": True, "lower_order_final": False},
        lambda **k: sampling.dpm_solver_pp(3, sde=True, lower_order_final=False, **k),
    ),
    "dpm_solver_pp singlestep": (
        {"order": 3, "singlestep": True},
        lambda **k: sampling.dpm_solver_pp(3, singlestep=True, **k),
    ),
    "unipc": (
        {"order": 3, "variant": "bh1", "lower_order_final": False},
        lambda **k: sampling.unipc(3, variant="bh1", lower_order_final=False, **k),
    ),
    "deis": ({"order": 3, "lower_order_final": False}, lambda **k: sampling.deis(3, lower_order_final=False, **k)),
    "pndm": ({}, lambda **k: sampling.pndm(**k)),
    "plms": ({}, lambda **k: sampling.pndm(runge_kutta=False, **k)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_sampler_of_a_config_equals_that_of_the_core(name):
    """The same function as the core's with the same options, by what it draws; each option changes that."""
    assert {name.split()[0] for name in OPTIONS} == set(sampler_config.SAMPLERS)
    options, made = OPTIONS[name]
    schedule = schedules.respace(schedules.from_betas(schedules.betas("linear", 1000)), 6, "log_snr")
    network = lambda x, time: jnp.sin(3 * x) * (1 + time[:, None] / 1000)  # noqa: E731
    x_T = jax.random.normal(jax.random.key(2), (2, 3))
    diffusion = ConfigDict({"prediction": "v", "variance": "fixed_large"})

    def run(sampler):
        return np.asarray(sampling.sample(jax.random.key(0), schedule, network, x_T, sampler))

    def configured(**leaves):
        leaves = {f"sampling.{leaf}": value for leaf, value in {"sampler": name.split()[0], **leaves}.items()}
        return run(sampler_config.sampler_from_config(conditional(**leaves).sampling, diffusion))

    np.testing.assert_array_equal(configured(**options), run(made(prediction="v")))
    for leaf in options:
        without = {key: value for key, value in options.items() if key != leaf}
        assert (configured(**without) != configured(**options)).any(), leaf


def test_every_clip_of_a_config_changes_the_predicted_x_0():
    x = 3 * jax.random.normal(jax.random.key(2), (1, 50))
    schedule = schedules.respace(schedules.from_betas(schedules.betas("linear", 1000)), 2, "log_snr")
    diffusion = ConfigDict({"prediction": "x_0", "variance": "fixed_large"})
    for leaves, expected in (
        ({"clip": True}, np.clip(x, -1, 1)),
        ({"clip": False}, x),
        ({"clip": "dynamic", "clip_quantile": 0.6}, process.dynamic_threshold(0.6)(x)),
    ):
        options = conditional(**{f"sampling.{leaf}": value for leaf, value in {"sampler": "ddim", **leaves}.items()})
        sampler = sampler_config.sampler_from_config(options.sampling, diffusion)
        x_0 = sampling.sample(jax.random.key(0), schedule, lambda x_t, time: x, x, sampler)
        np.testing.assert_allclose(x_0, expected, rtol=1e-6)


def test_given_steps_are_network_times():
    schedule = schedules.from_betas(schedules.betas("linear", 1000))
    options = {"steps": (10, 300.5, 900), "spacing": "given"}
    np.testing.assert_allclose(sampler_config.respace(schedule, options, sampling.ddim()).timesteps, [10, 300.5, 900])
    with pytest.raises(ValueError, match="needs sampling.steps="):
        sampler_config.respace(schedule, {"steps": 5, "spacing": "given"}, sampling.ddim())


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"steps": 250, "spacing": "openai"}, "250"),
        ({"steps": (10, 15, 20), "spacing": "openai"}, "10,15,20"),
        ({"steps": (10, 15, 20), "spacing": None}, "10,15,20"),  # as the command line reads 10,15,20
        ({"steps": 50, "spacing": "openai_ddim"}, "ddim50"),
    ],
)
def test_openai_spacings_can_be_given_by_name(options, same):
    schedule = schedules.from_betas(schedules.betas("linear", 1000))
    found = sampler_config.respace(schedule, options, sampling.ddpm())
    np.testing.assert_array_equal(found.timesteps, schedules.respace(schedule, same).timesteps)


@pytest.mark.parametrize(
    ("steps", "spacing", "words"),
    [
        ("250", None, "'250' is a string; .* --config.sampling.steps=250 --config.sampling.spacing=openai$"),
        ("10,15, 20", "trailing", "--config.sampling.steps=10,15,20 --config.sampling.spacing=openai$"),
        ("ddim5", None, "'ddim5' is a string; .* --config.sampling.steps=5 --config.sampling.spacing=openai_ddim$"),
        ("many", None, "'many' is a string; .* --config.sampling.steps=50 --config.sampling.spacing=NAME$"),
        ((1, 2), "trailing", r"\(1, 2\) are several numbers, .* use sampling.spacing=openai"),
        ((1, 2.5), "openai", "must be a whole number, or several"),
        (2.5, "openai", "must be a whole number, or several"),
        ((5, 5), "openai_ddim", "several numbers"),
        (5, "even", "spacing='even' is unknown; known: leading, .*, gaussian, openai_ddim, given"),
    ],
)
def test_steps_that_do_not_fit_the_spacing_are_refused(steps, spacing, words):
    schedule = schedules.from_betas(schedules.betas("linear", 1000))
    with pytest.raises(ValueError, match=words) as caught:
        sampler_config.respace(schedule, {"steps": steps, "spacing": spacing}, sampling.ddpm())
    assert "\n" not in str(caught.value)


def of(leaves, **diffusion):
    config = conditional(**{f"sampling.{leaf}": value for leaf, value in leaves.items()})
    config.diffusion.update(diffusion)
    built = training.setup(config)
    return sampling_setup.SamplingSetup(config, built.model, built.schedule, built.mesh)


def test_different_sampling_options_have_different_file_names(root):
    """Options are spelled; a digest stands for paths and for what is long."""
    names = {
        "ddpm5": {},
        "ddpm5_guided2": {"guidance_scale": 2.0},
        "ddpm5_guided2_interval1-5": {"guidance_scale": 2.0, "guidance_interval": (1, 5)},
        "ddpm5_guided2_interval2-5": {"guidance_scale": 2.0, "guidance_interval": (2, 5)},
        "ddpm5_guided2_rescale0.5": {"guidance_scale": 2.0, "guidance_rescale": 0.5},
        "ddpm5_guided2.0000001": {"guidance_scale": 2.0000001},
        "ddpm5_clip-none": {"clip": False},
        "ddpm5_clip-dynamic0.995": {"clip": "dynamic"},
        "ddim5_openai_clip-dynamic0.9_class3-5": {
            "sampler": "ddim",
            "spacing": "openai",
            "clip": "dynamic",
            "clip_quantile": 0.9,
            "label": (3, 5),
        },
        "ddpm5_openai2-3": {"steps": (2, 3)},
        "ddpm5_openai3-2": {"steps": (3, 2)},
        "ddpm5_openai_ddim": {"spacing": "openai_ddim"},
        "dpm_solver_pp5_order3_fullorder": {"sampler": "dpm_solver_pp", "order": 3, "lower_order_final": False},
        "unipc5_bh1": {"sampler": "unipc", "variant": "bh1"},
        "heun8_log_snr": {"sampler": "heun", "steps": 8},
        "heun8_log_snr_churn2_range0.1-20_noise1.1": {
            "sampler": "heun",
            "steps": 8,
            "churn": 2.0,
            "churn_range": (0.1, 20),
            "churn_noise": 1.1,
        },
    }
    for name, leaves in names.items():
        assert of(leaves).name == name
    digested = {
        of(leaves).name
        for leaves in (
            {"steps": (1, 5, 8, 15, 19), "spacing": "given"},
            {"steps": (2, 5, 8, 15, 19), "spacing": "given"},
            {"label": tuple(range(10)) * 3},
            {"label": tuple(range(10)) * 3 + (1,)},
            {"classifier": str(root / "classifier")},
            {"classifier": str(root / "classifier"), "classifier_form": "mean"},
        )
    }
    assert len(digested) == 6 and all(len(name.split("_")[-1]) == 6 for name in digested)


def test_steps_on_which_a_sampler_fails_are_refused():
    """With no spacing given heun, pndm and plms take one that works; the others that are known to fail are one line."""
    cosine = {"schedule": "cosine", "num_timesteps": 1000}
    for sampler in ("heun", "pndm", "plms"):
        chosen = of({"sampler": sampler, "steps": 20}, **cosine)
        assert chosen.name == f"{sampler}20_log_snr" and chosen.warning is None
        with pytest.raises(
            errors.UserError, match="would be noise; use sampling.spacing=log_snr or more steps"
        ) as caught:
            of({"sampler": sampler, "steps": 20, "spacing": "trailing"}, **cosine)
        assert f"sampling.sampler={sampler} with sampling.steps=20 and spacing trailing" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert of({"sampler": "ddim", "steps": 20}, **cosine).name == "ddim20"
    blurred = of({"sampler": "ddim", "steps": 5}, schedule="constant", num_timesteps=1000)
    assert "blurs the samples; use sampling.spacing=log_snr or more steps" in blurred.warning


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("conditional", {"sampling.label": 10}, r"sampling.class=10 must be classes in 0 \.\.\. 9"),
        ("conditional", {"sampling.label": "seven"}, "sampling.class=seven must be classes"),
        ("plain", {"sampling.label": 1}, "the model has no classes"),
        ("plain", {"sampling.guidance_scale": 2.0}, "needs a model trained with model.num_classes and"),
        ("conditional", {"sampling.label": True}, "sampling.class=True must be classes"),
        ("conditional", {"sampling.guidance_interval": (5,)}, "must be two numbers"),
        ("conditional", {"sampling.guidance_interval": (30, 10)}, "must be two numbers"),
        ("conditional", {"sampling.guidance_interval": ("a", "b")}, "must be two numbers"),
        ("conditional", {"sampling.guidance_scale": float("nan")}, "must be a finite number"),
        ("conditional", {"sampling.guidance_rescale": -3.0}, r"must lie in \[0, 1\]"),
        ("conditional", {"sampling.sampler": "heun", "sampling.churn": float("nan")}, "churn must be a number"),
        ("conditional", {"sampling.low_resolution_noise": 0.5}, r"must lie in 0 \.\.\. 0.0"),
        ("conditional", {"sampling.clip": "maybe"}, "must be True, False or 'dynamic'"),
        ("conditional", {"sampling.clip": "dynamic", "sampling.clip_quantile": 2.0}, "quantile must lie in"),
        ("conditional", {"sampling.sampler": "deis", "sampling.order": 4}, "order must be 1, 2 or 3"),
        ("conditional", {"sampling.sampler": "ddim", "sampling.eta": 2.0}, "eta must lie in"),
        ("conditional", {"sampling.steps": 19, "sampling.spacing": "quadratic"}, "visits step 0 twice"),
        ("conditional", {"sampling.low_resolution": "x"}, "is for models that enlarge images"),
        ("plain", {"sampling.classifier": "conditional"}, "holds no classifier"),
        ("plain", {"sampling.classifier": "nothing"}, "sampling.classifier=.*nothing: no such file or folder"),
        ("plain", {"sampling.classifier": "other_classifier"}, "another noise schedule"),
        ("plain", {"sampling.classifier": "classifier", "sampling.classifier_form": "x"}, "must be 'eps' or 'mean'"),
        (
            "plain",
            {
                "sampling.classifier": "classifier",
                "sampling.classifier_form": "mean",
                "sampling.sampler": "heun",
            },
            "use sampling.sampler='ddpm'",
        ),
    ],
)
def test_invalid_combinations_of_options_are_refused(root, name, overrides, words):
    overrides = dict(overrides)
    if "sampling.classifier" in overrides:
        overrides["sampling.classifier"] = str(root / overrides["sampling.classifier"])
    config = conditional(**overrides)
    if name == "plain":
        config = tiny_config(**{"diffusion.num_timesteps": T, **DRAWN, **overrides})
    with pytest.raises((errors.UserError, pretrained.PretrainedError), match=words) as caught:
        sample.run(config, root / name)
    assert "\n" not in str(caught.value)


def test_leaves_without_effect_are_listed():
    """Each alone, beside what reads it and beside what does not."""
    assert sampler_config.unused_leaves(tiny_config().sampling) == []
    for leaf, value, reader, other in (
        ("eta", 0.5, {"sampler": "ddim"}, {"sampler": "ddpm"}),
        ("order", 3, {"sampler": "deis"}, {"sampler": "ddim"}),
        ("variant", "bh1", {"sampler": "unipc"}, {"sampler": "dpm_solver_pp"}),
        ("singlestep", True, {"sampler": "dpm_solver_pp"}, {"sampler": "unipc"}),
        ("sde", True, {"sampler": "dpm_solver_pp"}, {"sampler": "heun"}),
        ("churn", 2.0, {"sampler": "heun"}, {"sampler": "pndm"}),
        ("classifier_scale", 4.0, {"classifier": "runs/classifier"}, {}),
        ("guidance_rescale", 0.7, {"guidance_scale": 2.0}, {}),
        ("guidance_interval", (10, 200), {"guidance_scale": 0.0}, {}),
    ):
        options = dict(tiny_config().sampling) | {leaf: value}
        assert sampler_config.unused_leaves(options | reader) == []
        (line,) = sampler_config.unused_leaves(options | other)
        assert line.startswith(f"sampling.{leaf}={value!r} (only ")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    images = data.load(tiny_config().data).read(np.arange(2))[0]
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4] = 0
    for name, image in {
        "image": images[0, ..., 0],
        "other": images[1, ..., 0],
        "mask": mask,
        "white": mask | 255,
        "black": mask & 0,
        "dim": mask // 3,
        "zero_one": mask // 255,
        "ones": mask // 255 | 1,
        "bits": mask < 256,
        "deep": np.full((8, 8), 300, np.uint16),
        "alpha": np.stack([mask & 0, mask & 0, mask & 0, mask], axis=-1),
        "wide": np.zeros((5, 9), np.uint8),
    }.items():
        Image.fromarray(image).save(directory / f"{name}.png")
    return directory


def editing_config(files, **overrides):
    named = {f"editing.{leaf}": str(files / f"{leaf}.png") for leaf in ("image", "other", "mask")}
    return conditional(**{"editing.num_samples": 3, "editing.resamplings": 2, "editing.jump": 2, **named, **overrides})


@pytest.mark.parametrize("task", ["inpaint", "replace", "sdedit", "super_resolution", "interpolate"])
def test_every_editing_task_writes_a_picture_and_an_npz(root, files, task):
    directory = root / "conditional"
    overrides = {"editing.task": task, "editing.factor": 2, "sampling.label": 4}
    if task == "interpolate":
        overrides |= {"sampling.sampler": "ddim", "sampling.clip": False, "sampling.steps": None}
    edit.run(editing_config(files, **overrides), directory)
    (path,) = (directory / "samples").glob(f"edit_{task}_*.npz")
    with np.load(path) as arrays:
        images = arrays["arr_0"]
    with Image.open(path.with_suffix(".png")) as picture:
        shown = 3 + {"inpaint": 2, "replace": 2, "interpolate": 2}.get(task, 1)
        assert picture.size == (68 * shown + 4, 72 + 14)
        captions = np.asarray(picture)[68:82, 4:].reshape(14, shown, 68)
        assert (captions.max(axis=(0, 2)) > 150).all()  # each image has its text
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
    built = training.setup(conditional())
    walked, full, model, params = parts_of(conditional(), directory)
    its = classifier_config(**{"diffusion.num_timesteps": T})
    classifier = training.model_from_config(its)
    _, guide = trained_model.load_weights(its, root / "classifier", classifier, built.mesh, True)
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
        for leaves, network, sampler in (
            (base, plain, sampling.ddpm(**small)),
            (by_classifier, guided, sampling.ddpm(**small)),
            (by_classifier | {"sampling.classifier_form": "mean"}, plain, sampling.ddpm(mean_shift=shift, **small)),
        ):
            edit.run(editing_config(files, **{**leaves, "editing.task": task}), directory)
            (path,) = set((directory / "samples").glob(f"edit_{task}_*.npz")) - made
            made.add(path)
            with np.load(path) as arrays:
                agree(arrays["arr_0"], jax.jit(lambda n=network, s=sampler, r=run: r(n, s))())
    for path in made:
        path.unlink()


def test_invalid_editing_options_are_refused(root, files):
    for overrides, words in (
        ({"editing.task": "foo"}, "known: inpaint, replace"),
        ({"editing.task": "colorize"}, "needs a model of color images"),
        ({"editing.mask": ""}, "editing.mask=FILE is needed"),
        ({"editing.image": str(files)}, "cannot be read as an image"),
        ({"editing.mask": str(files / "white.png")}, "white everywhere"),
        ({"editing.mask": str(files / "black.png")}, "black everywhere .values 0 to 0 of 255.: no pixel is kept"),
        ({"editing.mask": str(files / "dim.png")}, "black everywhere .values 0 to 85 of 255.: no pixel is kept"),
        ({"editing.mask": str(files / "ones.png")}, "white everywhere .values 1 to 1 of 1.: nothing is left"),
        ({"editing.mask": str(files / "bits.png")}, "white everywhere .values 1 to 1 of 1.: nothing is left"),
        ({"editing.mask": str(files / "deep.png")}, "black everywhere .values 300 to 300 of 65535.: no pixel"),
        (
            {"editing.mask": str(files / "alpha.png")},
            "black everywhere .values 0 to 0 of 255; transparency is ignored.",
        ),
        ({"editing.mask": str(files / "wide.png")}, "is 9x5 pixels and the image 8x8"),
        ({"editing.num_samples": 0}, "is too few"),
        ({"editing.jump": 5}, "leaves nothing to walk again"),
        ({"editing.task": "interpolate", "sampling.label": 3}, "only a deterministic sampler decodes"),
        ({"editing.task": "interpolate", "sampling.sampler": "ddim"}, "is of one class: give sampling.class"),
        ({"editing.task": "super_resolution", "editing.factor": 3}, "must divide the model's 8x8 pixels"),
        ({"editing.task": "sdedit", "editing.strength": 0.0}, "strength must lie in"),
        ({"sampling.sampler": "unipc"}, "use ddpm, ddim or heun"),
        (
            {"editing.task": "interpolate", "editing.level": 7, "sampling.label": 3},
            "editing.level=7 must be an index of the steps, 0 ... 4",
        ),
    ):
        with pytest.raises(errors.UserError, match=words):
            edit.run(editing_config(files, **overrides), root / "conditional")


def test_a_mask_of_zeros_and_ones_keeps_the_ones(root, files, capsys):
    """Saved as gray, as color, as 16 bits or as single bits: the same pixels are kept, and the console says which."""
    with Image.open(files / "zero_one.png") as mask:
        values = np.asarray(mask)
    kinds = {"gray": values, "color": np.stack([values] * 3, -1), "deep": values.astype(np.uint16), "bits": values > 0}
    for name, array in kinds.items():
        path = files / f"zero_one_{name}.png"
        Image.fromarray(array).save(path)
        edit.run(editing_config(files, **{"editing.task": "replace", "editing.mask": str(path)}), root / "conditional")
        out = capsys.readouterr().out
        assert "The mask keeps its white pixels, 32 of 64 (50%), and the model paints the black ones, 32 (50%)." in out
        written = pathlib.Path(out.split("the results alone: ")[1].strip())
        with np.load(written) as arrays, Image.open(files / "image.png") as image:
            kept = arrays["arr_0"][:, 4:, :, 0]
            np.testing.assert_array_equal(kept, np.broadcast_to(np.asarray(image)[4:], kept.shape))


def test_colorization_keeps_the_gray_values(tmp_path, files):
    config = tiny_config(**{"diffusion.num_timesteps": T, **DRAWN, "data.channels": 3})
    untrained(tmp_path / "run", config)
    config.editing.update(task="colorize", image=str(files / "image.png"), num_samples=2)
    edit.run(config, tmp_path / "run")
    (path,) = (tmp_path / "run" / "samples").glob("edit_colorize_*.npz")
    with np.load(path) as arrays:
        images = arrays["arr_0"].astype(int)
    with Image.open(files / "image.png") as image:
        gray = np.asarray(image).astype(int)
    inside = ((images > 0) & (images < 255)).all(-1)
    assert abs(images.mean(-1) - gray)[inside].max() <= 1 and (np.ptp(images, axis=-1) > 5).any()


def test_the_command_line_accepts_a_class(root):
    flags = ("--config.sampling.class=(2,)", "--config.sampling.progress=True", "--config.sampling.sampler=unipc")
    code, out, err = finish(start(f"--workdir={root / 'conditional'}", "--mode=sample", *flags))
    assert code == 0, err
    assert "step 5 of 5" in out
    np.testing.assert_array_equal(drawn(root / "conditional")[1], [2] * 6)
    code, _, err = finish(start(f"--workdir={root / 'nothing'}", "--mode=sample", "--config.sampling.class=1"))
    assert code == 2 and "holds no run whose config could be used" in err and len(err.strip().splitlines()) == 1
