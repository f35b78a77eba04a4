"""Samples from PyTorch networks in k-diffusion's and torchcfm's conventions, with loops written from the papers, against
this package's solvers with the same weights. Run by `make parity`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, coordinates, sampling, schedules
from helpers import torch_networks

pytestmark = pytest.mark.parity

KEY = jax.random.key(0)
SIGMA_DATA = 0.5


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def network(torch):
    """A network of x [B, 2] and time [B], in PyTorch, and the same function for JAX arrays with copies of the weights."""
    linear, silu = torch.nn.Linear, torch.nn.SiLU
    layers = torch_networks.redraw(torch.nn.Sequential(linear(3, 32), silu(), linear(32, 32), silu(), linear(32, 2)))
    weights = [parameter.detach().numpy().copy() for parameter in layers.parameters()]

    def theirs(x, time):
        return layers(torch.cat([x, time[:, None]], dim=1))

    def ours(x, time):
        x = jnp.concatenate([x, time[:, None]], axis=1)
        for kernel, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = jax.nn.silu(x @ kernel.T + bias)
        return x @ weights[-2].T + weights[-1]

    with torch.no_grad(), jax.default_matmul_precision("highest"):
        yield theirs, ours


def noise():
    return np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)


def denoiser(network, library):
    """k-diffusion's D(y, s): a network with Karras et al.'s preconditioning (table 1)."""

    def denoise(y, s):
        variance = s**2 + SIGMA_DATA**2
        c_skip = SIGMA_DATA**2 / variance
        c_out = s * SIGMA_DATA / library.sqrt(variance)
        c_in = 1 / library.sqrt(variance)
        output = network(c_in[:, None] * y, library.log(s) / 4)
        return c_skip[:, None] * y + c_out[:, None] * output

    return denoise


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_denoiser_of_k_diffusion(torch, network, method):
    """Karras et al.'s Algorithm 1 (and Euler's method) in y, from s = 80 to 0.002 and 0."""
    theirs, ours = network
    steps = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 20) ** 7
    denoise = denoiser(theirs, torch)
    slope = lambda y, s: (y - denoise(y, s.expand(len(y)))) / s  # noqa: E731
    y = 80 * torch.from_numpy(noise())
    for s, s_next in itertools.pairwise(torch.tensor([*steps, 0.0], dtype=torch.float32)):
        here = slope(y, s)
        end = y + (s_next - s) * here
        if method == "heun" and s_next > 0:
            end = y + (s_next - s) * (here + slope(end, s_next)) / 2
        y = end

    path = schedules.edm()
    schedule = schedules.from_path(path, np.log(steps[::-1]) / 4)
    x_T = 80 * schedule.transitions.level.alpha[-1].astype(np.float32) * noise()
    sampler = sampling.SAMPLERS[method]()
    y = y.numpy()
    assert y.std() > 0.1
    # The denoiser, or the network inside the denoiser.
    free = {"prediction": "x_0", "clip": False}
    for ours_in_x_t in (
        Denoiser(coordinates.from_edm(denoiser(ours, jnp), path), **free),
        Denoiser(coordinates.precondition(ours, path, SIGMA_DATA), **free),
        Denoiser(ours, sigma_data=SIGMA_DATA, **free),
    ):
        samples = sampling.sample(KEY, schedule, ours_in_x_t, x_T, sampler)
        np.testing.assert_allclose(samples, y, atol=1e-5)


def test_a_velocity_of_torchcfm(torch, network):
    """Euler's method on dx/dt = v(t, x) from noise at t = 0 to data at t = 1, where v is the mean of x_1 - x_0."""
    theirs, ours = network
    times = np.linspace(0, 1, 21)
    x = torch.from_numpy(noise())
    for t, t_next in itertools.pairwise(torch.from_numpy(times).float()):
        x = x + (t_next - t) * theirs(x, t.expand(len(x)))

    path = schedules.rectified_flow()
    schedule = schedules.from_path(path, 1000 * (1 - times[:-1])[::-1])
    velocity = coordinates.from_flow(lambda z, tau: -ours(z, 1 - tau), path)
    flow = Denoiser(velocity, prediction="flow", clip=False)
    samples = sampling.sample(KEY, schedule, flow, noise(), sampling.euler())
    x = x.numpy()
    assert abs(x - noise()).mean() > 0.1
    np.testing.assert_allclose(samples, x, atol=1e-5)
