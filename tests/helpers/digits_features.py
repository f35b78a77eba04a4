"""Features of the digits network, all images at once."""

import numpy as np

from diffusion_jax.evaluation import digits


def by_hand(drawn):
    params, _ = digits.load()
    return np.asarray(digits.DigitsNetwork().apply({"params": params}, drawn).features)
