"""The small images that an upsampler enlarges: `sampling.low_resolution`."""

from __future__ import annotations

import zipfile
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import UserError
from diffusion_jax.storage.downloads import local_path

__all__ = ["SmallImages", "read_small_images"]


class SmallImages(NamedTuple):
    """images: uint8 [N, h, w, C]. labels: [N]. Each is None if there are none."""

    images: np.ndarray | None
    labels: np.ndarray | None


def read_small_images(config: ConfigDict) -> SmallImages:
    """The images that an upsampler enlarges and their labels, if they have any; (None, None) for other models.

    Raises: UserError, DataError.
    """
    path, side = config.sampling.low_resolution, config.data.low_resolution
    if not side:
        return SmallImages(None, None)
    if not path:
        raise UserError(
            "this model enlarges images: set sampling.low_resolution to an .npz of --mode=sample or to a folder of images"
        )
    height, width, channels = data.example_shape(config.data)  # `training.model_from_config` refuses other data
    size = (side, width * side // height)
    source = local_path(path)
    if source.is_dir():
        folder = data.Folder(str(source), size, channels)
        return SmallImages(folder.read(np.arange(len(folder)))["image"], None)
    if source.is_file() and not zipfile.is_zipfile(source):
        raise UserError(f"sampling.low_resolution={path!r} is neither a folder nor an .npz with arr_0")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays.get("arr_1")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"sampling.low_resolution={path!r} is neither a folder nor an .npz with arr_0: {error}"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (*size, channels):
        raise UserError(
            f"sampling.low_resolution={path!r} holds {images.dtype} {images.shape}; this model enlarges uint8 images of "
            f"{size[0]}x{size[1]} with {channels} channels"
        )
    if not len(images):
        raise UserError(f"sampling.low_resolution={path!r} holds no images")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(
            f"sampling.low_resolution={path!r} holds {len(images)} images and labels of shape {labels.shape}; there must be "
            "one label for each image"
        )
    return SmallImages(images, labels)
