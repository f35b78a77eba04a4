"""The trained weights of a work directory, or those of others that a run begins with."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from diffusion_jax import models, pretrained
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError
from diffusion_jax.training import input_shape, schedule_from_config
from diffusion_jax.training.checkpoints import Checkpoints, committed_steps
from diffusion_jax.training.step import initial_params

# Fields of a network that change nothing of what its weights compute.
_FREE = {"dropout", "dtype", "remat", "initializer"}


def load(config: Mapping, directory: pathlib.Path, model, mesh, use_ema: bool):
    """(step, params) of the newest checkpoint, whole on every device of the mesh; of step 0 where nothing is trained yet and
    `config.init_from` names weights. Raises: UserError where there are none; pretrained.PretrainedError.
    """
    whole = sharding.replicated(mesh)
    if config["init_from"] and not committed_steps(directory / "checkpoints"):
        params, differing = initial(config, model, use_ema)
        if differing:
            raise UserError(
                f"init_from={config['init_from']} was trained for another diffusion ({'; '.join(differing)})"
            )
        return 0, jax.device_put(params, whole)
    if not (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory} holds no checkpoints; train first: python main.py --config=... --workdir={directory}"
        )
    shapes = jax.eval_shape(lambda: initial_params(jax.random.key(0), model, input_shape(config)))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_weights(abstract, use_ema)
    if restored is None:
        raise UserError(f"{directory} holds no finished checkpoint yet; train longer")
    return restored


def digest(params) -> str:
    """SHA-256 of every name, shape, type and number of a tree of arrays: which weights these are, wherever they lie."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        found.update(array.view(np.uint8).data if array.size else b"")
    return found.hexdigest()


def origin(config: Mapping, step: int) -> str:
    """The part of a file's name that says whose weights made it: step500, or what `config.init_from` is called."""
    return pathlib.Path(config["init_from"]).stem if config["init_from"] and not step else f"step{step}"


def initial(config: Mapping, model: models.UNet | models.Classifier, use_ema: bool = True):
    """(params, differing): the parameters that `config.init_from` names, and how what they were trained for differs from
    `config.diffusion`, a phrase each. Raises: UserError where they are another network's; PretrainedError.
    """
    path = config["init_from"]
    try:
        net = pretrained.load(path, pretrained.read_flags(config["init_flags"]), use_ema)
    except pretrained.PretrainedError as error:
        raise pretrained.PretrainedError(f"init_from={path}: {error}") from error
    if type(net.model) is not type(model):
        raise UserError(f"init_from={path} is a {type(net.model).__name__}, and the config's a {type(model).__name__}")
    # An output as wide as the image is written as None or as a number.
    theirs = net.model
    if isinstance(theirs, models.UNet):
        theirs = theirs.clone(out_channels=theirs.out_channels or net.channels)
        model = model.clone(out_channels=model.out_channels or config["data"]["channels"])
    differing = [
        f"model.{name}: {getattr(theirs, name)!r} there, {getattr(model, name)!r} here"
        for name in sorted(set(models.fields_of(model)) - _FREE)
        if getattr(theirs, name) != getattr(model, name)
    ]
    if net.in_channels != input_shape(config)[2]:
        differing.append(f"input channels: {net.in_channels} there, {input_shape(config)[2]} here")
    if differing:
        raise UserError(
            f"init_from={path} is another network ({'; '.join(differing)}); --pretrained={path} takes its config"
        )
    schedule, diffusion = schedule_from_config(config["diffusion"]), config["diffusion"]
    says = {}
    if isinstance(net.model, models.UNet):
        says["prediction"] = (net.prediction, diffusion["prediction"])
        if any(variance.startswith("learned") for variance in (net.variance, diffusion["variance"])):
            says["variance"] = (net.variance, diffusion["variance"])  # the fixed ones are no network's, but a choice
    phrases = [f"{name}: {theirs!r} there, {own!r} here" for name, (theirs, own) in says.items() if theirs != own]
    if any(
        not np.array_equal(getattr(net.schedule, name), getattr(schedule, name)) for name in ("timesteps", "alpha_bar")
    ):
        phrases.append("another noise schedule")
    return net.params, phrases
