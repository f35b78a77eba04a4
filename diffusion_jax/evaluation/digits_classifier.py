"""A small classifier of scikit-learn's 8x8 digits, for metrics of their samples without a download.

It is not Inception: its metrics compare samples of digits with one another only. It was trained by
`benchmarks/digits_features.py`, on the images that samples are compared with.
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from diffusion_jax.images import to_model_range

__all__ = ["PATH", "ClassifierOutput", "DigitsNetwork", "load"]

PATH = pathlib.Path(__file__).with_name("digits.safetensors")


class ClassifierOutput(NamedTuple):
    """features: [B, 64], before the last layer. logits: [B, 10]."""

    features: Any
    logits: Any


class DigitsNetwork(nn.Module):
    """The classifier of images uint8 [B, 8, 8, 1]."""

    @nn.compact
    def __call__(self, images) -> ClassifierOutput:
        """images: uint8 [B, 8, 8, 1]. Raises: ValueError for other shapes and dtypes."""
        if images.shape[1:] != (8, 8, 1):
            remedy = "--image_size=8 resizes folders" if images.shape[1:3] != (8, 8) else "--channels=1 makes them gray"
            raise ValueError(
                f"the digits' network takes gray images of 8x8 pixels, not {'x'.join(map(str, images.shape[1:]))}; "
                f"{remedy} (python -m diffusion_jax.evaluation)"
            )
        x = to_model_range(images)
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv_1")(x))
        features = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return ClassifierOutput(features, nn.Dense(10, name="logits")(features))


def load() -> tuple[Any, str]:
    """(params, SHA-256 of the file)."""
    from safetensors.numpy import load as parse

    content = PATH.read_bytes()
    flat = {tuple(name.split(".")): jnp.asarray(value) for name, value in parse(content).items()}
    return flax.traverse_util.unflatten_dict(flat), hashlib.sha256(content).hexdigest()
