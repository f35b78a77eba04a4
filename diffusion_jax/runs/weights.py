"""The trained weights of a work directory."""

from __future__ import annotations

import pathlib

import jax

from diffusion_jax.runs.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.step import initial_params


def load(directory: pathlib.Path, model, image_shape: tuple[int, int, int], mesh, use_ema: bool):
    """(step, params) of the newest checkpoint, whole on every device of the mesh. Raises: UserError where there is none."""
    if not (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory} holds no checkpoints; train first: python main.py --config=... --workdir={directory}"
        )
    shapes = jax.eval_shape(lambda: initial_params(jax.random.key(0), model, image_shape))
    whole = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_weights(abstract, use_ema)
    if restored is None:
        raise UserError(f"{directory} holds no finished checkpoint yet; train longer")
    return restored
