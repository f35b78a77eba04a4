"""This package's networks against PyTorch's on the same weights, with `make parity`: outputs, gradients, files, samples."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained, sampling, schedules
from diffusion_jax.models import upsampling
from diffusion_jax.pretrained import diffusers, ho, openai
from diffusion_jax.pretrained.parameters import Tensors, parameter_shapes, to_torch
from helpers import torch_networks
from helpers.published_files import LEARNED, README, SCHEDULER, ho_variables, worst, write_folder

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _needs_pytorch():
    """Also sets full float32 products, which GPUs and TPUs do not compute by default."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("guided_diffusion")
    with jax.default_matmul_precision("highest"):
        yield


def weights_of(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def save(model, path):
    """Saves the weights as OpenAI does: a plain state dict."""
    import torch

    torch.save(model.state_dict(), path)
    return path


def ours(net, x, times, y=None, low=None):
    def run(params):
        labels = () if y is None else (y,)
        options = {} if low is None else {"condition": upsampling.condition(low, x.shape)}
        return net.model.apply({"params": params}, x, jnp.float32(times), *labels, **options)

    return np.asarray(jax.jit(run)(net.params))


def typed(text):
    """A flag's value, as OpenAI's scripts read the flag."""
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdecimal() else float(text) if text.replace(".", "").isdecimal() else text


def agree(what, ours, theirs):
    """Within 2e-5 of the largest value."""
    error = worst(ours, theirs)
    print(f"| {what} | {error:.1e} |")
    assert theirs.std() > 0.1
    assert error < 2e-5, what


def net_size(net):
    return sum(leaf.size for leaf in jax.tree.leaves(net.params))


def inputs(size, seed=1, count=2):
    rng = np.random.default_rng(seed)
    height, width = (size, size) if isinstance(size, int) else size
    return rng.normal(size=(count, height, width, 3)).astype(np.float32), np.array([3, 777, 500][:count])


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        ("cifar10", torch_networks.PUBLISHED, (32, (16, 24))),
        ("256", torch_networks.LARGE, (64,)),
        ("defaults", {"sample_size": 32}, (32,)),
        ("improved", torch_networks.IMPROVED, ((16, 32),)),
        ("adm", torch_networks.ADM, ((16, 32),)),
    ],
)
def test_diffusers_networks(name, config, sizes, tmp_path):
    """In google/ddpm-*'s shapes at full width, and with the library's defaults."""
    model = torch_networks.diffusers(config)
    model.save_pretrained(tmp_path / "unet")  # its own files and config
    (tmp_path / "scheduler").mkdir()
    scheduler = LEARNED if config.get("out_channels") == 6 else SCHEDULER
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    net = pretrained.load(tmp_path)
    for size in sizes:
        x, times = inputs(size)
        y = np.array([4, 0]) if config.get("num_class_embeds") else None
        theirs = torch_networks.run(model, x, times, y)
        agree(f"diffusers, {name}, {size} pixels", ours(net, x, times, y), theirs)


@pytest.mark.parametrize("name", torch_networks.OPENAI)
def test_openai_s_networks(name, tmp_path):
    """Every published set of flags, narrowed, at several sizes; the flags as a dict."""
    function, flags = torch_networks.OPENAI[name]
    model = torch_networks.openai(function, flags)
    net = pretrained.load(
        save(model, tmp_path / "m.pt"), {**flags, "diffusion_steps": 1000, "noise_schedule": "linear"}
    )
    for size in (64,) if function == "create_classifier" else (64, (128, 64)):
        x, times = inputs(size)
        y = np.array([3, 999]) if flags.get("class_cond") else None
        low = None
        if function == "sr_create_model":
            low = np.random.default_rng(2).normal(size=(2, *(s // 4 for s in x.shape[1:3]), 3)).astype(np.float32)
        agree(
            f"OpenAI, {name}, {x.shape[1:3]}", ours(net, x, times, y, low), torch_networks.run(model, x, times, y, low)
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm_imagenet64", "improved_cifar10", "adm_upsampler_64_256", "adm_classifier64"])
def test_openai_s_networks_at_full_width(name, tmp_path):
    """A network of each kind with the published size; takes gigabytes and minutes."""
    flags = {name: typed(value) for name, value in openai.parse_flags(README[name]).items()}
    size, low, _ = openai.PRESETS[name]
    taken = {key: value for key, value in flags.items() if not key.startswith(("diffusion", "noise", "rescale"))}
    common = torch_networks.OPENAI["improved"][1]
    if "classifier" in name:
        function, known = "create_classifier", torch_networks.OPENAI["classifier"][1] | {"classifier_width": 128}
    elif low:
        function, known = "sr_create_model", torch_networks.OPENAI["adm upsampler"][1] | {"num_head_channels": -1}
    else:
        function, known = "create_model", {**common, "class_cond": False}
    made = {**known, **taken, **({"use_fp16": False} if "classifier" not in name else {})}
    if size == 32:
        made["channel_mult"], made["attention_resolutions"] = "1,2,2,2", "16,8"
    model = torch_networks.openai(function, made)
    net = pretrained.load(save(model, tmp_path / "m.pt"), name)
    x, times = inputs(min(size, 64), count=1)
    y = np.array([7]) if flags.get("class_cond") else None
    small = None if not low else np.random.default_rng(2).normal(size=(1, 16, 16, 3)).astype(np.float32)
    theirs = torch_networks.run(model, x, times, y, small)
    agree(f"OpenAI, {name}, {net_size(net):,} parameters", ours(net, x, times, y, small), theirs)


@pytest.mark.parametrize("name", ["diffusers", "openai", "classifier", "upsampler"])
def test_gradients(name, tmp_path):
    """Gradients of a weighted sum over the output, with respect to every parameter: PyTorch's, converted like weights,
    against ours."""
    import torch

    config = {"diffusers": torch_networks.IMPROVED}.get(name)
    function, flags = torch_networks.OPENAI[{"classifier": name, "upsampler": "adm upsampler"}.get(name, "adm 64")]
    model = torch_networks.diffusers(config) if config else torch_networks.openai(function, flags)
    x, times = inputs(64 if not config else (16, 32))
    y = None if name == "classifier" else np.array([4, 0])
    low = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32) if name == "upsampler" else None
    out = torch_networks.call(model, x, times, y, low)
    weighting = np.random.default_rng(5).normal(size=out.shape).astype(np.float32)
    (out * torch.from_numpy(weighting)).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert all(abs(g).max() > 0 for g in gradients.values())
    if config:
        net = pretrained.load(write_folder(tmp_path / "f", {**config}, weights_of(model)))
        theirs = pretrained.load(write_folder(tmp_path / "g", {**config}, gradients)).params
    else:
        flags = {**flags, "diffusion_steps": 1000, "noise_schedule": "linear"}
        net = pretrained.load(save(model, tmp_path / "m.pt"), flags)
        tensors = Tensors("PyTorch", {n: g.shape for n, g in gradients.items()}, gradients.get)
        theirs = openai.load_openai(pathlib.Path("g"), tensors, flags, with_params=True).params
    weighting = weighting.transpose(0, 2, 3, 1) if weighting.ndim == 4 else weighting
    labels = () if y is None else (y,)
    options = {} if low is None else {"condition": upsampling.condition(low, x.shape)}
    apply = lambda p: net.model.apply({"params": p}, x, jnp.float32(times), *labels, **options)  # noqa: E731
    loss = lambda p: (apply(p) * weighting).sum()  # noqa: E731
    own = jax.jit(jax.grad(loss))(net.params)
    errors = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(theirs), strict=True):
        if jax.tree_util.keystr(path).endswith("['k']['bias']"):  # cancels in the softmax: only rounding
            assert abs(a).max() < 1e-3 * abs(own["conv_in"]["kernel"]).max()
            continue
        errors.append(worst(a, b))
        assert errors[-1] < 1e-4, jax.tree_util.keystr(path)
    print(f"| gradients, {name} | {max(errors):.1e} |")


def test_exported_models_sample_in_diffusers_own_pipeline(tmp_path):
    """The same DDIM samples from the same x_T."""
    import torch
    from diffusers import DDIMScheduler, DDPMPipeline

    model = torch_networks.diffusers(torch_networks.DIFFUSERS["unet_ddpm_cifar10_narrow"])
    net = pretrained.load(
        write_folder(tmp_path / "in", {**torch_networks.DIFFUSERS["unet_ddpm_cifar10_narrow"]}, weights_of(model))
    )
    pretrained.save_diffusers(net, tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    images = pipeline(batch_size=1, num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", set_alpha_to_one=True, clip_sample=True
    )
    scheduler.set_timesteps(10)
    x_T = np.random.default_rng(3).normal(size=(2, 32, 32, 3)).astype(np.float32)
    x = torch_networks.images(x_T)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    schedule = schedules.respace(net.schedule, 10, "leading")
    draw = jax.jit(lambda x_T: sampling.sample(jax.random.key(0), schedule, net.denoiser(), x_T, sampling.ddim()))
    samples = draw(x_T)
    error = abs(np.asarray(samples) - x.numpy().transpose(0, 2, 3, 1)).max()
    print(f"| ten steps of DDIM in diffusers' scheduler (largest difference) | {error:.1e} |")
    assert error < 1e-4


def test_ho_s_checkpoint_is_diffusers_conversion(tmp_path):
    """The same weights as a TensorFlow checkpoint and as a google/ddpm-* folder, which diffusers' own network reads."""
    import tensorflow as tf

    model = torch_networks.diffusers(torch_networks.PUBLISHED)
    net = pretrained.load(write_folder(tmp_path / "f", {**torch_networks.PUBLISHED}, weights_of(model)))
    shapes = parameter_shapes(net.model, (32, 32, 3))
    import flax.traverse_util

    flat = flax.traverse_util.flatten_dict(net.params)
    port = {ho.NAMING(path, net.model): to_torch(np.asarray(flat[path]), path) for path in shapes}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        made = [
            tf.compat.v1.get_variable(f"{name}{suffix}", initializer=value)
            for name, value in ho_variables(port).items()
            for suffix in ("", "/ExponentialMovingAverage")
        ]
        session.run(tf.compat.v1.global_variables_initializer())
        path = tf.compat.v1.train.Saver(made).save(session, str(tmp_path / "model.ckpt"), global_step=790000)
    x, times = inputs(32)
    read = pretrained.load(path)
    assert read.variance == "fixed_large" and read.family.endswith("ddpm_cifar10")
    agree(
        "Ho et al., TensorFlow checkpoint, 35,746,307 parameters",
        ours(read, x, times),
        torch_networks.run(model, x, times),
    )


def test_every_container_of_pytorch_has_the_same_weights(tmp_path):
    import torch

    function, flags = torch_networks.OPENAI["improved"]
    model = torch_networks.openai(function, flags)
    path = save(model, tmp_path / "m.pt")
    flags = {**flags, "diffusion_steps": 1000, "noise_schedule": "linear"}
    net = pretrained.load(path, flags)
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "nested.ckpt")
    torch.save({n: v.half() for n, v in model.state_dict().items()}, tmp_path / "half.bin")
    for name, tolerance in (("old.pt", 0), ("nested.ckpt", 0), ("half.bin", 2e-3)):
        again = pretrained.load(tmp_path / name, flags)
        jax.tree.map(lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, atol=t), again.params, net.params)


def test_diffusers_older_files(tmp_path):
    """.bin weights beside config.json in one folder, as in google/ddpm-cifar10-32."""
    import torch

    model = torch_networks.diffusers(torch_networks.PUBLISHED)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **torch_networks.PUBLISHED}))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    net = pretrained.load(tmp_path)
    x, times = inputs(32)
    agree("diffusers, .bin", ours(net, x, times), torch_networks.run(model, x, times))
    assert diffusers.find_configs(tmp_path)[0] == tmp_path
