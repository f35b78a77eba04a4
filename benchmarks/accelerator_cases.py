"""Cases of benchmarks/accelerator.py, each measured in its own process: this project, diffusers on PyTorch, single layers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
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

from benchmarks import compiled, diffusers_network, roofline
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
    """One measurement.

    work: train, sample, a name of `LAYERS`, or device. precision: float32, tf32 or bfloat16. library: ours, torch, or hlo to
    read the compiled program. steps: of DDIM. small: a tiny network of the same kind. seconds: duration of the timed calls.
    mode: of torch.compile, or eager. changes: steps_per_call, donate; for hlo the target.
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
    """The config of a case: its network with three output channels, L_simple, Adam with clipping, no flips."""
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
    """The results of a case, or {"error": one line} if it fails."""
    functions = {
        "device": describe_device,
        "torch": measure_diffusers,
        "hlo": summarize_program,
        "ours": measure_ours,
    }
    function = measure_layer if case.work in LAYERS else functions["device" if case.work == "device" else case.library]
    try:
        return function(case)
    except Exception as error:  # the benchmark continues with the other cases
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        no_memory = any(word in text.lower() for word in ("out of memory", "resource_exhausted", "outofmemory"))
        return {"error": "out of memory" if no_memory else text[:200].replace("|", "/")}


def describe_device(case: Case) -> dict:
    """The platform, the kind of the device, and the versions of the libraries."""
    names = ("jax", "jaxlib", "flax", "torch", "diffusers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")
    versions = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if importlib.util.find_spec("torch") and not shutil.which("g++"):
        versions.append("no C++ compiler, so torch is eager on CPUs")
    return {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "versions": ", ".join(versions)}


def timed(call: Callable, wait: Callable, seconds: float) -> tuple[float, float]:
    """(seconds of the first call, median seconds per call of five series of calls, each with one wait at its end)."""

    def time_series(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return time.perf_counter() - start

    first, warm = time_series(1), [time_series(1) for _ in range(3)]
    calls = max(1, round(seconds / 5 / min(warm)))
    return first, statistics.median(time_series(calls) / calls for _ in range(5))


def _process_peak() -> int:
    """The peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _set_jax_precision(precision: str) -> None:
    """Sets full float32 products for float32; for tf32 and bfloat16 jax's default."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)


def _size_of(case: Case, built: training.TrainingProgram, parameters) -> dict:
    shape = data.example_shape(config_of(case)["data"])
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return {"parameters": count, "gmac": roofline.forward_macs(built.model, shape) / 1e9}


def _train(case: Case) -> tuple[training.TrainingProgram, Callable, dict]:
    """(program of the config, compiled function of one or several steps, shapes of its batch)."""
    config = config_of(case)
    built = training.build_program(config)
    num_steps = case.changes.get("steps_per_call", 1) if built.train_steps else 1
    step = built.train_steps if num_steps > 1 else built.train_step
    if not case.changes.get("donate", True):
        step = jax.jit(step.__wrapped__, compiler_options=compiler.options())
    leading = (num_steps,) if num_steps > 1 else ()
    image = jax.ShapeDtypeStruct((*leading, case.batch, *data.example_shape(config["data"])), jnp.uint8)
    return built, step, {"image": image, "label": jax.ShapeDtypeStruct((*leading, case.batch), jnp.int32)}


def _sample(case: Case) -> tuple[training.TrainingProgram, Callable, tuple]:
    """(program of the config, compiled function (params, x_T, y) -> x_0 by DDIM, shapes of its arguments)."""
    config = config_of(case)
    built = training.build_program(config)
    short = schedules.respace(built.schedule, case.steps)

    def generate(params, x_T, y):
        network = models.precompute_time_embeddings(built.model, params, short.timesteps)

        def denoise_fn(x_t, time):
            return network(x_t, time, y if built.model.num_classes else None)

        return sampling.sample(jax.random.key(0), short, denoise_fn, x_T, sampling.ddim())

    x_T = jax.ShapeDtypeStruct((case.batch, *data.example_shape(config["data"])), jnp.float32)
    program = jax.jit(generate, compiler_options=compiler.options())
    return built, program, (built.abstract_state.params, x_T, jax.ShapeDtypeStruct((case.batch,), jnp.int32))


def measure_ours(case: Case) -> dict:
    """This project: the train step that `training.build_program` builds, or DDIM."""
    _set_jax_precision(case.precision)
    if case.work == "train":
        built, step, shapes = _train(case)
        results = [built.init()]
        batch = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), shapes)
        images = case.batch * (case.changes["steps_per_call"] if batch["label"].ndim == 2 else 1)

        def call():
            results[0], _ = step(results[0], batch)

        parameters = results[0].params
    else:
        built, program, (_, x_T, y) = _sample(case)
        results, images, parameters = [None], case.batch, built.init().params
        x_T, y = jax.random.normal(jax.random.key(1), x_T.shape), jnp.zeros(y.shape, y.dtype)

        def call():
            results[0] = program(parameters, x_T, y)

    size = _size_of(case, built, parameters)
    first, seconds = timed(call, lambda: jax.block_until_ready(results), case.seconds)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or _process_peak()
    return size | {"rate": images / seconds, "first": first, "peak": peak}


def measure_diffusers(case: Case) -> dict:
    """diffusers' network of the same shape under torch.compile, in channels_last, with a fused Adam on GPUs."""
    import torch
    from diffusers import UNet2DModel

    fields = diffusers_network.unet_fields(config_of(case))
    parameters, macs = diffusers_network.count_parameters_and_macs(fields)
    gpu = torch.cuda.is_available()
    device, note = torch.device("cuda" if gpu else "cpu"), ""
    torch.set_float32_matmul_precision("highest" if case.precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = case.precision != "float32"
    torch.backends.cudnn.benchmark = True
    model = UNet2DModel(**fields).to(device, memory_format=torch.channels_last)
    network = model
    if case.mode == "eager" or not (gpu or shutil.which("g++")):
        note = " (eager)"
    else:
        network = torch.compile(model, mode=case.mode)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16")
    x = torch.randn(case.batch, 3, *[fields["sample_size"]] * 2, device=device).to(memory_format=torch.channels_last)
    labels = {}
    if fields["num_class_embeds"]:
        labels["class_labels"] = torch.zeros(case.batch, dtype=torch.long, device=device)

    if case.work == "train":
        model.train()
        call = diffusers_network.make_train_step(network, model, x, autocast, labels, fused=gpu)
    else:
        model.eval()
        call = diffusers_network.make_ddim(network, x, autocast, labels, case.steps)
    first, seconds = timed(call, torch.cuda.synchronize if gpu else lambda: None, case.seconds)
    peak = torch.cuda.max_memory_allocated() if gpu else _process_peak()
    measured = {"rate": case.batch / seconds, "first": first, "peak": peak, "note": note}
    return measured | {"parameters": parameters, "gmac": macs / 1e9}


def summarize_program(case: Case) -> dict:
    """A summary of the kernels of a case's program, compiled for `changes["target"]` and not run."""
    _set_jax_precision(case.precision)
    with compiled.target(case.changes["target"]) as kind:
        if case.work == "train":
            built, program, batch = _train(case)
            arguments = (built.abstract_state, batch)
        else:
            built, program, arguments = _sample(case)
            sharding = jax.tree.leaves(built.abstract_state.params)[0].sharding
            arguments = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
            )
        text = program.lower(*arguments).compile().as_text()
    if folder := os.environ.get("KEEP_HLO"):
        name = f"{case.changes['target']}_{case.network}_{case.work}_{case.precision}.txt"
        pathlib.Path(folder, name).write_text(text)
    summary = compiled.summary(compiled.kernels(text), case.steps if case.work == "sample" else 1)
    return _size_of(case, built, built.abstract_state.params) | {"summary": summary._asdict(), "kind": kind}


def _conv(inputs: int, outputs: int) -> Callable:
    def make(batch: int, side: int):
        return convolution.convolve_xla, ((batch, side, side, inputs), (3, 3, inputs, outputs))

    return make


def _norm(batch: int, side: int):
    """GroupNorm and SiLU, as before a convolution: limited by memory bandwidth."""

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


# The most common layer, layers whose bfloat16 autotuning has failed (3 -> 128, 128 -> 3), and one with two implementations.
LAYERS: dict[str, Callable] = {
    "convolution 128 -> 128": _conv(128, 128),
    "convolution 3 -> 128": _conv(3, 128),
    "convolution 128 -> 3": _conv(128, 3),
    "GroupNorm and SiLU": _norm,
    "attention, xla": _attention("xla"),
    "attention, cudnn": _attention("cudnn"),
}


def measure_layer(case: Case) -> dict:
    """One layer, forward and backward, at 32x32 pixels (4x4 if small): its time and its error against float32."""
    _set_jax_precision(case.precision)
    layer, shapes = LAYERS[case.work](case.batch, 4 if case.small else 32)
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    exact = [jax.random.normal(jax.random.key(i), shape) / (i * 30 + 1) for i, shape in enumerate(shapes)]
    rounded = [value.astype(dtype) for value in exact]

    def forward_and_backward(*arguments):
        out, pullback = jax.vjp(layer, *arguments)
        return out, pullback(out)

    program, results = jax.jit(forward_and_backward, compiler_options=compiler.options()), []

    def call():
        results[:] = [program(*rounded)]

    first, seconds = timed(call, lambda: jax.block_until_ready(results), case.seconds)
    reference = LAYERS["attention, xla"](case.batch, 4 if case.small else 32)[0] if "cudnn" in case.work else layer
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(reference, compiler_options=compiler.options())(
            *(value.astype(jnp.float32) for value in rounded)
        )
    error = jnp.linalg.norm((results[0][0] - truth).ravel()) / jnp.linalg.norm(truth.ravel())
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((rounded, results)))
    flops = 6 * roofline.macs(reference, *exact)
    return {"call": seconds, "first": first, "flops": flops, "bytes": moved, "deviation": float(error)}
