"""Paths, and the exact networks and denoisers of Gaussian data on them."""

import numpy as np

from diffusion_jax import Denoiser, schedules

EDM = schedules.edm()
FLOW = schedules.rectified_flow(interval=(1.0, 999.0))
CUSTOM = schedules.path(lambda time: 10 - 20 * time - time**3, interval=(0.0, 1.0))
PATHS = {name: make() for name, make in schedules.PATHS.items()} | {
    "inner flow": FLOW,
    "shifted": schedules.shifted(schedules.vp_cosine(), -2.0),
    "custom": CUSTOM,
    "linear steps": schedules.from_betas(schedules.betas("linear", 1000)).path,
}


def inner_times(path, count=9):
    first, last = path.interval
    return np.linspace(first, last, count + 2)[1:-1]


def gaussian(path, variance=1.0):
    """The exact network for x_0 ~ N(0, variance), which predicts x_0."""

    def denoise_fn(x_t, time):
        at = path.at(time, x_t)
        return variance * at.alpha / (variance * at.alpha**2 + at.sigma**2) * x_t

    return denoise_fn


def exact_denoiser(path, data_variance, **fields):
    """`gaussian` as an unclipped denoiser."""
    return Denoiser(gaussian(path, data_variance), "x_0", clip=False, **fields)


def levels(path, sigmas):
    """The schedule with these sigma / alpha, in increasing order."""
    return schedules.from_path(path, path.time_at_log_snr(-2 * np.log(sigmas)))


def rho_levels(count):
    """sigma / alpha in EDM's steps (Karras et al. 2022, eq. 5)."""
    return (0.002 ** (1 / 7) + np.arange(count) / (count - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
