"""Other coordinates: preconditioning, EDM's networks and flow matching, against the formulas of the papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import Denoiser, coordinates, losses, sampling, schedules
from diffusion_jax.denoiser import convert
from helpers.path_networks import EDM, rho_levels

KEY = jax.random.key(0)


def test_preconditioning_makes_the_edm_loss_the_error_of_the_network():
    """lambda(s) c_out^2 = 1, and for d = 1 the network is -v."""
    x_0 = jax.random.normal(KEY, (64, 4))
    off = lambda x, time: jnp.sin(3 * x) + time[:, None]  # noqa: E731
    for d in (0.5, 1.0):
        denoise_fn = coordinates.precondition(off, EDM, d)
        weight = lambda snr: losses.edm_weight(snr, d)  # noqa: B023, E731
        loss, aux = losses.simple(KEY, EDM, denoise_fn, x_0, prediction="x_0", weighting=weight, draw="log_normal")
        at = EDM.at(aux.t, x_0)
        s = np.asarray(at.sigma / at.alpha, np.float64)
        y = np.asarray(aux.x_t / at.alpha, np.float64)
        target = (x_0 - d**2 / (s**2 + d**2) * y) * np.sqrt(s**2 + d**2) / (s * d)
        np.testing.assert_allclose(
            loss,
            np.mean((target - off(aux.x_t / np.sqrt(at.sigma**2 + (d * at.alpha) ** 2), aux.t)) ** 2, 1),
            rtol=2e-3,
        )
    v = convert(denoise_fn(aux.x_t, aux.t), aux.x_t, at, "x_0", "v")
    np.testing.assert_allclose(v, -off(aux.x_t, aux.t), rtol=1e-4, atol=1e-3)


def test_others_coordinates_give_the_same_samples():
    """Euler's method in z and Heun's in y, in float64 NumPy with the papers' formulas, against the samplers."""
    d2 = 0.3
    sigma = rho_levels(18)[::-1]
    start = np.random.default_rng(0).normal(size=(6, 1))
    schedule = schedules.edm_steps(18)
    ratio = schedule.transitions.level.sigma / schedule.transitions.level.alpha
    np.testing.assert_allclose(ratio[::-1], sigma, rtol=1e-9)  # eq. 5
    steeper = schedules.edm_steps(5, sigma_min=0.01, sigma_max=10.0, rho=3.0)
    np.testing.assert_allclose(steeper.snr**-0.5, np.linspace(0.01 ** (1 / 3), 10 ** (1 / 3), 5) ** 3, rtol=1e-9)

    # EDM's Algorithm 2 with D(y; s) for N(0, d2), which ends at s = 0.
    denoiser = lambda y, s: d2 / (d2 + s**2) * y  # noqa: E731
    y = sigma[0] * start
    for s, s_next in zip(sigma, np.append(sigma[1:], 0), strict=True):
        slope = (y - denoiser(y, s)) / s
        end = y + (s_next - s) * slope
        if s_next:
            end = y + (s_next - s) * (slope + (end - denoiser(end, s_next)) / s_next) / 2
        y = end
    edm_fn = coordinates.from_edm(lambda y, s: d2 / (d2 + s[:, None] ** 2) * y, EDM)
    with jax.enable_x64(True):
        x_T = jnp.asarray(schedule.transitions.level.sigma[-1] * start)
        ours = sampling.sample(KEY, schedule, Denoiser(edm_fn, "x_0", clip=False), x_T, sampling.heun())
    np.testing.assert_allclose(ours, y, rtol=1e-7)

    # Flow matching from tau = 1 - 1e-3 to 0: Euler's method on dz/dtau = u(z, tau).
    tau = np.append(np.linspace(0.999, 0.05, 20), 0)
    velocity = lambda z, tau: (tau - (1 - tau) * d2) * z / ((1 - tau) ** 2 * d2 + tau**2)  # noqa: E731
    z = z_0 = start
    for now, after in itertools.pairwise(tau):
        z = z + (after - now) * velocity(z, now)
    path = schedules.rectified_flow()
    schedule = schedules.from_path(path, 1000 * tau[-2::-1])
    flow_fn = coordinates.from_flow(lambda z, tau: velocity(z, tau[:, None]), path)
    with jax.enable_x64(True):
        x_T = jnp.asarray(z_0 / np.hypot(0.999, 0.001))
        ours = sampling.sample(KEY, schedule, Denoiser(flow_fn, "flow", clip=False), x_T, sampling.euler())
    np.testing.assert_allclose(ours, z, rtol=1e-7)
