"""Features of the digits network, all images at once."""

import numpy as np

from diffusion_jax.evaluation import digits_classifier


def by_hand(drawn):
    params, _ = digits_classifier.load()
    return np.asarray(digits_classifier.DigitsNetwork().apply({"params": params}, drawn).features)
