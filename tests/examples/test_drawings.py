"""examples/drawings.py, the training images of the first tutorial, and its config."""

import random

import numpy as np

from diffusion_jax import config as configs
from diffusion_jax.functions import import_function
from helpers.paths import ROOT

SCRIPT = ROOT / "examples" / "drawings.py"


def test_every_class_is_drawn_in_the_config_s_size_and_no_two_drawings_are_equal():
    config, classes = configs.experiment("drawings"), import_function(f"{SCRIPT}:draw").__globals__["CLASSES"]
    assert len(classes) == config.model.num_classes
    random.seed(0)
    draw, pixels = (import_function(f"{SCRIPT}:{name}") for name in ("draw", "pixels"))
    images = np.stack([np.asarray(draw(kind)) for kind in classes for _ in range(4)])
    assert images.dtype == np.uint8 and images.shape[1:] == (config.data.image_size, config.data.image_size, 3)
    assert len({image.tobytes() for image in images}) == len(images)
    features = pixels(images)
    assert features.shape == (len(images), images[0].size) and features.max() <= 1
