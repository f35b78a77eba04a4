"""Cases for benchmarks/accelerator.py, each measured in its own process: this project, and diffusers on PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import diffusers_network, roofline
from configs import cifar10, imagenet64_adm, imagenet_adm
from diffusion_jax import data, sampling, schedules, training
from diffusion_jax.config import default
from diffusion_jax.distributed import devices

_CONFIGS = {"cifar10": cifar10.get_config, "adm64": imagenet64_adm.get_config, "adm256": imagenet_adm.get_config}
NETWORKS = tuple(_CONFIGS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    work: train, sample or device. precision: float32, tf32 or bfloat16. library: ours or torch. steps: number of DDIM steps.
    small: use a tiny network of the same kind. seconds: duration of the timed calls. mode: torch.compile's mode, or eager.
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


def config_of(case: Case) -> ConfigDict:
    """Returns the config of a case: a network with three output channels, L_simple, Adam with clipping, no flips."""
    config, base = _CONFIGS[case.network](), default()
    config.optimizer, config.diffusion.loss, config.diffusion.variance = base.optimizer, "simple", "fixed_large"
    config.data.random_flip = False
    config.training.update(batch_size=case.batch, steps_per_call=1)
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
    """Measures a case; returns {"error": one line} if it fails."""
    functions = {"device": describe_device, "torch": measure_diffusers, "ours": measure_ours}
    function = functions["device" if case.work == "device" else case.library]
    try:
        return function(case)
    except Exception as error:  # the benchmark continues with the next case
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        no_memory = any(word in text.lower() for word in ("out of memory", "resource_exhausted", "outofmemory"))
        return {"error": "out of memory" if no_memory else text[:200].replace("|", "/")}


def describe_device(case: Case) -> dict:
    """Returns the platform, the device kind and the library versions."""
    names = ("jax", "jaxlib", "flax", "torch", "diffusers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")
    versions = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if importlib.util.find_spec("torch") and not shutil.which("g++"):
        versions.append("no C++ compiler, so torch is eager on CPUs")
    return {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "versions": ", ".join(versions)}


def timed(call: Callable, wait: Callable, seconds: float) -> tuple[float, float]:
    """Returns (seconds of the first call, median seconds per call over five series of calls with one wait at the end)."""

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
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _set_jax_precision(precision: str) -> None:
    """Selects full float32 products for float32, and JAX's default for tf32 and bfloat16."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)


def _size_of(case: Case, built: training.TrainingProgram, parameters) -> dict:
    shape = data.example_shape(config_of(case)["data"])
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return {"parameters": count, "gmac": roofline.forward_macs(built.model, shape) / 1e9}


def measure_ours(case: Case) -> dict:
    """Measures this project: the train step from `training.build_program`, or DDIM."""
    _set_jax_precision(case.precision)
    config = config_of(case)
    built = training.build_program(config)
    state, y = built.init(), jnp.zeros(case.batch, jnp.int32)
    parameters, shape = state.params, (case.batch, *data.example_shape(config["data"]))
    size = _size_of(case, built, parameters)
    results: list[Any] = [state]
    if case.work == "train":
        batch = {"image": jnp.zeros(shape, jnp.uint8), "label": y}

        def call():
            results[0], _ = built.train_step(results[0], batch)
    else:
        short, x_T = schedules.respace(built.schedule, case.steps), jax.random.normal(jax.random.key(1), shape)

        @functools.partial(jax.jit, compiler_options=devices.compiler_options())
        def generate(params, x_T, y):
            def network(x_t, time):
                return built.model.apply({"params": params}, x_t, time, y if built.model.num_classes else None)

            return sampling.sample(jax.random.key(0), short, network, x_T, sampling.ddim())

        def call():
            results[0] = generate(parameters, x_T, y)

    first, seconds = timed(call, lambda: jax.block_until_ready(results), case.seconds)
    peak = devices.peak_memory() or _process_peak()
    return size | {"rate": case.batch / seconds, "first": first, "peak": peak}


def measure_diffusers(case: Case) -> dict:
    """Measures diffusers' network with the same shape: torch.compile, channels_last, and a fused Adam on GPUs."""
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
