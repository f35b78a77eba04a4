"""The fixtures' networks, loaded in each family's format, and the outputs."""

import json

import jax
import jax.numpy as jnp

from diffusion_jax import pretrained
from helpers import torch_networks
from helpers.published_files import CLASSIFIER_FLAGS, NARROW_FLAGS, stored, write, write_folder

FAMILIES = (*torch_networks.DIFFUSERS, *torch_networks.STORED_OPENAI, "port_narrow")


def load(directory, name):
    """A fixture's network, from a file or a folder in the family's format."""
    weights, arrays = stored(name)
    if name in torch_networks.DIFFUSERS:
        return pretrained.load(write_folder(directory / name, json.loads(str(arrays["config"])), weights)), arrays
    flags = {"openai_narrow": NARROW_FLAGS, "openai_classifier_narrow": CLASSIFIER_FLAGS}.get(
        name, {"image_size": 16, "variance": "fixed_small"}
    )
    return pretrained.load(write(directory / f"{name}.safetensors", weights), flags), arrays


def output(net, arrays, shift=0):
    """Our network on a fixture's inputs, in float32 at the highest precision."""
    labels = (arrays["y"],) if "y" in arrays else ()
    with jax.default_matmul_precision("highest"):
        return jax.jit(
            lambda p: net.model.apply({"params": p}, arrays["x"], jnp.float32(arrays["time"] + shift), *labels)
        )(net.params)
