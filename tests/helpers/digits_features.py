"""Features of the digits network, all images at once."""

import numpy as np

from diffusion_jax.evaluation import features


def by_hand(drawn):
    extractor = features.digits()
    return np.asarray(features.DigitsNetwork().apply({"params": extractor.params}, drawn)[0])
