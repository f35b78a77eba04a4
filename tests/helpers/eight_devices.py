"""Measurements of test_sharding.py on eight virtual devices: `python -m helpers.eight_devices` prints JSON."""

import functools
import json
import math
import os
import re
import sys
from unittest import mock

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
import jax
import numpy as np

from diffusion_jax import config as configs
from diffusion_jax import training
from diffusion_jax.distributed import sharding
from diffusion_jax.runs import plan
from helpers.configs import a_batch, tiny_config

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
MESHES = [(1, 1), (8, 1), (2, 4)]  # data, fsdp: as many devices as their product
# Everything random: flips, timesteps, noise, dropout, dropped labels.
DRAWING = {"data.random_flip": True, "model.num_classes": 10, "model.label_dropout": 0.3}


def on(data: int, fsdp: int, **overrides):
    return tiny_config(**{"mesh.data": data, "mesh.fsdp": fsdp, **DRAWING, **overrides})


@functools.cache
def build(data: int, fsdp: int) -> training.TrainingProgram:
    """Builds the program on the first data * fsdp devices, as if no other devices existed."""
    with mock.patch("jax.device_count", lambda: data * fsdp):
        return training.build_program(on(data, fsdp))


def trajectories():
    """The losses of four steps on each mesh, and whether mesh (2, 4) starts from the same weights as one device."""
    out, begun = {}, jax.device_get(build(1, 1).init())
    split = jax.device_get(build(2, 4).init())
    for mesh in MESHES:
        built, losses = build(*mesh), []
        state = jax.device_put(begun, jax.tree.map(lambda leaf: leaf.sharding, built.abstract_state))
        for i in range(4):
            state, metrics = built.train_step(state, a_batch(on(*mesh), i))
            losses.append(float(metrics["loss"]))
        out["x".join(map(str, mesh))] = losses
    rows = [sharding.process_rows(8, build(*mesh).mesh).tolist() for mesh in MESHES]
    # Two programs draw the same bits, but may round computed values differently.
    same = functools.partial(np.allclose, rtol=1e-6, atol=1e-6)
    return {"losses": out, "rows": rows, "same_init": all(jax.tree.leaves(jax.tree.map(same, begun, split)))}


def own_networks():
    """The losses of four steps of a user's networks on one device, and on eight with split parameters."""
    out = {}
    for kind in ("linen", "of_nnx", "pair"):
        texts = {"model.kind": f"helpers.own_networks:{kind}", "model.dropout": "0" if kind == "pair" else "0.3"}
        begun, out[kind] = None, []
        for data, fsdp in ((1, 1), (2, 4)):
            settings = {"mesh.data": data, "mesh.fsdp": fsdp, "training.accumulation_steps": 1}
            config = configs.override(tiny_config(**settings), texts)
            with mock.patch("jax.device_count", lambda count=data * fsdp: count):
                built, losses = training.build_program(config), []
            begun = begun or jax.device_get(built.init())
            state = jax.device_put(begun, jax.tree.map(lambda leaf: leaf.sharding, built.abstract_state))
            for i in range(4):
                state, metrics = built.train_step(state, a_batch(config, i))
                losses.append(float(metrics["loss"]))
            out[kind].append(losses)
    return out


def collectives(compiled) -> dict:
    """A program's communication: kinds of collectives, bytes of gathered arrays, and bytes of summed arrays."""
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    found = re.findall(pattern, compiled.as_text())
    sizes = {kind: [] for _, kind in found}
    for result, kind in found:
        shapes = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", result)
        sizes[kind].append(sum(math.prod(map(int, filter(None, s.split(",")))) * int(bits) // 8 for bits, s in shapes))
    return {
        "kinds": sorted(sizes),
        "gathers": sizes.get("all-gather", []),
        "reduced": sum(sizes.get("all-reduce", [])),
    }


def program():
    """The state's bytes and the bytes that a train step sends, for a network of 1.6 million parameters with fsdp=8."""

    def build(remat: bool):
        config = tiny_config(**{"mesh.fsdp": 8, "model.channels": 128, "model.remat": remat})
        built = training.build_program(config)
        return built, built.train_step.lower(built.abstract_state, a_batch(config)).compile()

    (built, compiled), (_, recomputing) = build(False), build(True)
    state = built.abstract_state
    held = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
    params = jax.tree.leaves(state.params)
    return collectives(compiled) | {
        "remat": collectives(recomputing),
        "params": sum(leaf.size for leaf in params) * 4,
        "whole": sum(leaf.size for leaf in params if leaf.sharding.is_fully_replicated) * 4,
        "largest": max(leaf.size for leaf in params) * 4,
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "held": sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in held),
        "init_temporary": built.init.func.lower(*built.init.args).compile().memory_analysis().temp_size_in_bytes,
        "traced": [_traced(remat) for remat in (False, (0,), True)],
    }


def _traced(remat: bool | tuple[int, ...]) -> tuple[int, bool]:
    """How many convolutions a train step of two resolutions with fsdp=8 has, and whether it has a jax.checkpoint."""
    config = on(1, 8, **{"model.remat": remat, "model.channel_multipliers": (1, 2)})
    built = training.build_program(config)
    text = str(built.train_step.trace(built.abstract_state, a_batch(config)).jaxpr)
    return text.count("conv_general_dilated["), any(f"{name}[" in text for name in plan.CHECKPOINTS)


if __name__ == "__main__":
    output = sys.stdout
    sys.stdout = sys.stderr  # what runs say
    found = {"program": program()}
    sharding.MIN_SPLIT_SIZE = 64  # from here on, the tiny network's arrays are split, too
    print(json.dumps(found | {"trajectories": trajectories(), "own_networks": own_networks()}), file=output)
