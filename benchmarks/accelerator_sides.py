"""What benchmarks/accelerator.py measures in a process of its own: this project, diffusers on PyTorch, single layers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import compiled, roofline
from configs import cifar10, imagenet64_adm, imagenet_adm
from diffusion_jax import data, models, sampling, schedules, training
from diffusion_jax.config import default
from diffusion_jax.distributed import compiler
from diffusion_jax.models import convolution
from diffusion_jax.models.layers import GroupNorm

_CONFIGS = {"cifar10": cifar10.get_config, "adm64": imagenet64_adm.get_config, "adm256": imagenet_adm.get_config}
NETWORKS = tuple(_CONFIGS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement. work: train, sample, a layer of `PARTS`, or device. precision: float32, tf32 or bfloat16.

    library: ours, torch, or hlo to read the compiled program. steps: DDIM's. small: a tiny network of the same kind. seconds:
    of timed calls. mode: of torch.compile, or eager. changes: steps_per_call, donate; of hlo the target.
    """

    network: str
    work: str
    precision: str
    batch: int
    library: str = "ours"
    steps: int = 50
    small: bool = False
    seconds: float = 2.0
    mode: str = "default"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def config_of(case: Case) -> ConfigDict:
    """The config that a case trains: its network, L_simple of three channels, Adam with clipping, no flips."""
    config, base = _CONFIGS[case.network](), default()
    config.optimizer, config.diffusion.loss, config.diffusion.variance = base.optimizer, "simple", "fixed_large"
    config.data.random_flip = False
    config.training.update(batch_size=case.batch, steps_per_call=case.changes.get("steps_per_call", 1))
    config.model.dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    config.mesh.update(data=1, fsdp=1)
    if case.small:
        config.data.image_size = 16
        config.model.update(
            channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), num_groups=8
        )
        if config.model.num_classes:
            config.model.update(num_classes=10, head_channels=16)
    return config


def measure(case: Case) -> dict:
    """The figures of a case; {"error": one line} where it fails, as out of memory."""
    sides = {"device": device, "torch": theirs, "hlo": read, "ours": ours}
    side = part if case.work in PARTS else sides["device" if case.work == "device" else case.library]
    try:
        return side(case)
    except Exception as error:  # a benchmark goes on with what does not fail
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        full = any(word in text.lower() for word in ("out of memory", "resource_exhausted", "outofmemory"))
        return {"error": "out of memory" if full else text[:200].replace("|", "/")}


def device(case: Case) -> dict:
    """What the machine is, and the versions of what runs on it."""
    names = ("jax", "jaxlib", "flax", "torch", "diffusers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")
    versions = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if importlib.util.find_spec("torch") and not shutil.which("g++"):
        versions.append("no C++ compiler, so torch runs eagerly on CPUs")
    return {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "versions": ", ".join(versions)}


def timed(call: Callable, wait: Callable, seconds: float) -> tuple[float, float]:
    """(seconds of the first call, median seconds of later ones): five stretches of calls, each waited for as a whole."""

    def stretch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return time.perf_counter() - start

    first, warm = stretch(1), [stretch(1) for _ in range(3)]
    calls = max(1, round(seconds / 5 / min(warm)))
    return first, statistics.median(stretch(calls) / calls for _ in range(5))


def _process_peak() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _set_jax_precision(precision: str) -> None:
    """float32 as it is; tf32, and whatever bfloat16 leaves in float32, as jax runs it where it is not told."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)


def _figures(case: Case, built: training.Setup, parameters) -> dict:
    shape = data.image_shape(config_of(case)["data"])
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return {"parameters": count, "gmac": roofline.forward_macs(built.model, shape) / 1e9}


def _train(case: Case) -> tuple[training.Setup, Callable, dict]:
    """(what is built, its program of a step or of several, shapes of the batch that this takes)."""
    config = config_of(case)
    built = training.setup(config)
    several = case.changes.get("steps_per_call", 1) if built.train_steps else 1
    step = built.train_steps if several > 1 else built.train_step
    if not case.changes.get("donate", True):
        step = jax.jit(step.__wrapped__, compiler_options=compiler.options())
    leading = (several,) if several > 1 else ()
    image = jax.ShapeDtypeStruct((*leading, case.batch, *data.image_shape(config["data"])), jnp.uint8)
    return built, step, {"image": image, "label": jax.ShapeDtypeStruct((*leading, case.batch), jnp.int32)}


def _sample(case: Case) -> tuple[training.Setup, Callable, tuple]:
    """(what is built, (params, x_T, y) -> x_0 by DDIM, shapes of what it takes)."""
    config = config_of(case)
    built = training.setup(config)
    short = schedules.respace(built.schedule, case.steps)

    def generate(params, x_T, y):
        network = models.precompute_time_embeddings(built.model, params, short.timesteps)

        def denoise_fn(x_t, time):
            return network(x_t, time, y if built.model.num_classes else None)

        return sampling.sample(jax.random.key(0), short, denoise_fn, x_T, sampling.ddim())

    x_T = jax.ShapeDtypeStruct((case.batch, *data.image_shape(config["data"])), jnp.float32)
    program = jax.jit(generate, compiler_options=compiler.options())
    return built, program, (built.abstract_state.params, x_T, jax.ShapeDtypeStruct((case.batch,), jnp.int32))


def ours(case: Case) -> dict:
    """This project: the train step that `training.setup` builds, or DDIM."""
    _set_jax_precision(case.precision)
    if case.work == "train":
        built, step, shapes = _train(case)
        held = [built.init()]
        batch = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), shapes)
        images = case.batch * (case.changes["steps_per_call"] if batch["label"].ndim == 2 else 1)

        def call():
            held[0], _ = step(held[0], batch)

        parameters = held[0].params
    else:
        built, program, (_, x_T, y) = _sample(case)
        held, images, parameters = [None], case.batch, built.init().params
        x_T, y = jax.random.normal(jax.random.key(1), x_T.shape), jnp.zeros(y.shape, y.dtype)

        def call():
            held[0] = program(parameters, x_T, y)

    figures = _figures(case, built, parameters)
    first, seconds = timed(call, lambda: jax.block_until_ready(held), case.seconds)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or _process_peak()
    return figures | {"rate": images / seconds, "first": first, "peak": peak}


def diffusers_fields(config: ConfigDict) -> dict:
    """A network of ours as fields of diffusers' `UNet2DModel`: the same shape, parameter for parameter."""
    model = config.model
    levels, attention = len(model.channel_multipliers), model.attention_levels
    kind = "Resnet{}sampleBlock2D" if model.resample_blocks else "{}Block2D"
    resample = "resnet" if model.resample_blocks else "conv"
    return {
        "sample_size": config.data.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(round(model.channels * m) for m in model.channel_multipliers),
        "layers_per_block": model.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if i in attention else kind.format("Down") for i in range(levels)),
        "up_block_types": tuple(
            "AttnUpBlock2D" if i in attention else kind.format("Up") for i in reversed(range(levels))
        ),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": model.downsample_padding[0],
        "flip_sin_to_cos": model.embedding_cos_first,
        "freq_shift": int(model.embedding_freq_shift),
        "norm_eps": model.norm_epsilon,
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": model.num_groups,
        "attention_head_dim": model.head_channels,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "num_class_embeds": model.num_classes or None,
        "dropout": model.dropout,
    }


def torch_macs(fields: dict) -> tuple[int, int]:
    """(parameters, multiplications of a call for one image) of diffusers' network, without its arrays."""
    import torch
    from diffusers import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    size = fields["sample_size"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet2DModel(**fields)
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if fields["num_class_embeds"] else {}
        model(torch.zeros(1, 3, size, size), torch.zeros(1), **labels)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def theirs(case: Case) -> dict:
    """diffusers' network of the same shape under torch.compile, in channels_last, with a fused Adam on GPUs."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    fields = diffusers_fields(config_of(case))
    parameters, multiplied = torch_macs(fields)
    gpu = torch.cuda.is_available()
    where, note = torch.device("cuda" if gpu else "cpu"), ""
    torch.set_float32_matmul_precision("highest" if case.precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = case.precision != "float32"
    torch.backends.cudnn.benchmark = True
    model = UNet2DModel(**fields).to(where, memory_format=torch.channels_last)
    network = model
    if case.mode == "eager" or not (gpu or shutil.which("g++")):
        note = " (eager)"
    else:
        network = torch.compile(model, mode=case.mode)
    half = torch.autocast(where.type, torch.bfloat16, enabled=case.precision == "bfloat16")
    x = torch.randn(case.batch, 3, *[fields["sample_size"]] * 2, device=where).to(memory_format=torch.channels_last)
    labels = {}
    if fields["num_class_embeds"]:
        labels["class_labels"] = torch.zeros(case.batch, dtype=torch.long, device=where)
    wait = torch.cuda.synchronize if gpu else lambda: None

    if case.work == "train":
        weights = list(model.parameters())
        ema = [p.detach().clone() for p in weights]
        adam = torch.optim.Adam(weights, lr=2e-4, fused=gpu)
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=where), 0)
        model.train()

        def call():
            t, eps = torch.randint(0, 1000, (case.batch,), device=where), torch.randn_like(x)
            a = alpha_bar[t].reshape(-1, 1, 1, 1)
            with half:
                output = network(a.sqrt() * x + (1 - a).sqrt() * eps, t, **labels).sample
            loss = ((output.float() - eps) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, weights, 1e-4)
    else:
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
        scheduler.set_timesteps(case.steps)
        times = [(t, t.to(where)) for t in scheduler.timesteps]  # the scheduler's tables live on the CPU
        model.eval()

        def call():
            x_t = x
            with torch.no_grad(), half:
                for t, there in times:
                    x_t = scheduler.step(network(x_t, there, **labels).sample.float(), t, x_t).prev_sample

    first, seconds = timed(call, wait, case.seconds)
    peak = torch.cuda.max_memory_allocated() if gpu else _process_peak()
    found = {"rate": case.batch / seconds, "first": first, "peak": peak, "note": note}
    return found | {"parameters": parameters, "gmac": multiplied / 1e9}


def read(case: Case) -> dict:
    """The kernels of a case's program, compiled for `changes["target"]` without running it."""
    _set_jax_precision(case.precision)
    with compiled.target(case.changes["target"]) as kind:
        if case.work == "train":
            built, program, batch = _train(case)
            arguments = (built.abstract_state, batch)
        else:
            built, program, arguments = _sample(case)
            whole = jax.tree.leaves(built.abstract_state.params)[0].sharding
            arguments = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments
            )
        text = program.lower(*arguments).compile().as_text()
    if folder := os.environ.get("KEEP_HLO"):  # for whoever wants to read it, too
        with open(
            os.path.join(folder, f"{case.changes['target']}_{case.network}_{case.work}_{case.precision}.txt"), "w"
        ) as f:
            f.write(text)
    found = compiled.summary(compiled.kernels(text), case.steps if case.work == "sample" else 1)
    return _figures(case, built, built.abstract_state.params) | {"summary": found._asdict(), "kind": kind}


def _conv(inputs: int, outputs: int) -> Callable:
    def make(batch: int, side: int):
        return convolution.convolve_xla, ((batch, side, side, inputs), (3, 3, inputs, outputs))

    return make


def _norm(batch: int, side: int):
    """GroupNorm and SiLU as they stand before a convolution: what bounds them is memory."""

    def layer(x, scale):
        params = {"norm": {"scale": scale, "bias": jnp.zeros_like(scale)}}
        return jax.nn.silu(GroupNorm(32, 1e-6, x.dtype).apply({"params": params}, x))

    return layer, ((batch, side, side, 128), (128,))


def _attention(implementation: str) -> Callable:
    def make(batch: int, side: int):
        def layer(x, scale):
            q = x * scale
            return jax.nn.dot_product_attention(q, x, x, implementation=implementation)

        return layer, ((batch, (side // 2) ** 2, 4, 64), (64,))

    return make


# Layers alone: the common one, those whose bfloat16 autotuning has failed (3 -> 128, 128 -> 3), and what has two ways.
PARTS: dict[str, Callable] = {
    "convolution 128 -> 128": _conv(128, 128),
    "convolution 3 -> 128": _conv(3, 128),
    "convolution 128 -> 3": _conv(128, 3),
    "GroupNorm and SiLU": _norm,
    "attention, xla": _attention("xla"),
    "attention, cudnn": _attention("cudnn"),
}


def part(case: Case) -> dict:
    """One layer, forward and backward, at 32x32 pixels (4x4 if small): its rate, and its error against float32's result."""
    _set_jax_precision(case.precision)
    layer, shapes = PARTS[case.work](case.batch, 4 if case.small else 32)
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    exact = [jax.random.normal(jax.random.key(i), shape) / (i * 30 + 1) for i, shape in enumerate(shapes)]
    rounded = [value.astype(dtype) for value in exact]

    def both(*arguments):
        out, back = jax.vjp(layer, *arguments)
        return out, back(out)

    program, held = jax.jit(both, compiler_options=compiler.options()), []

    def call():
        held[:] = [program(*rounded)]

    first, seconds = timed(call, lambda: jax.block_until_ready(held), case.seconds)
    plain = PARTS["attention, xla"](case.batch, 4 if case.small else 32)[0] if "cudnn" in case.work else layer
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(plain, compiler_options=compiler.options())(*(value.astype(jnp.float32) for value in rounded))
    off = jnp.linalg.norm((held[0][0] - truth).ravel()) / jnp.linalg.norm(truth.ravel())
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((rounded, held)))
    flops = 6 * roofline.macs(plain, *exact)
    return {"call": seconds, "first": first, "flops": flops, "bytes": moved, "deviation": float(off)}
