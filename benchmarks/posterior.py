"""Compares posterior samplers with the exact posterior of a Gaussian field, as docs/results/benchmarks.md shows.

    python benchmarks/posterior.py --measurements=200 --samples=16

A periodic 16 x 16 field with spectrum (1 + k^2)^-1.5 and mean variance 1; 32 of its 256 pixels are measured at random places,
with equal noise or with a deviation for each pixel. The denoiser is exact, so that only the method errs. Printed for each
method: the error of the mean in posterior deviations (root mean square, without the error from the number of samples), the
ratio of the sampled and the exact deviation, chi-squared for each measured number, calls of the network (a gradient counts as
two), and seconds for all samples after compilation.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import Denoiser, covariances, posterior, sampling, schedules
from diffusion_jax.measurements import Measurement, masked

SIZE, MEASURED, STEPS = 16, 32, 50
PATH = schedules.edm(0.002, 80.0)


def spectrum() -> np.ndarray:
    """The variance of each Fourier coefficient, with mean 1."""
    k = np.fft.fftfreq(SIZE, 1 / SIZE)
    power = (1 + k[:, None] ** 2 + k**2) ** -1.5
    return power / power.mean()


def denoiser() -> Denoiser:
    """The exact denoiser of the field."""
    power = jnp.asarray(spectrum())[None, :, :, None]

    def network(x_t, time):
        level = PATH.at(time, x_t)
        gain = level.alpha * power / (level.alpha**2 * power + level.sigma**2)
        return jnp.fft.ifft2(gain * jnp.fft.fft2(x_t, axes=(1, 2)), axes=(1, 2)).real

    return Denoiser(network, prediction="x_0", clip=False)


def covariance() -> np.ndarray:
    """The covariance of the field's pixels [256, 256]."""
    row = np.fft.ifft2(spectrum()).real
    index = np.arange(SIZE)
    shift = (index[:, None] - index) % SIZE
    return row[shift[:, None, :, None], shift[None, :, None, :]].reshape(SIZE**2, SIZE**2)


def main() -> None:
    """Prints a table for each kind of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16, help="for each measurement")
    options = parser.parse_args()
    count, draws, rng = options.measurements, options.samples, np.random.default_rng(0)
    prior, mask = covariance(), np.zeros(SIZE**2, bool)
    mask[rng.choice(SIZE**2, MEASURED, replace=False)] = True
    truth = rng.normal(size=(count, SIZE**2)) @ np.linalg.cholesky(prior + 1e-10 * np.eye(SIZE**2)).T
    examples = (rng.normal(size=(3000, SIZE**2)) @ np.linalg.cholesky(prior + 1e-10 * np.eye(SIZE**2)).T).reshape(
        -1, SIZE, SIZE, 1
    )
    print(f"{count} measurements, {draws} samples each, {STEPS} steps, float32, {jax.devices()[0].device_kind}")
    for kind in ("equal", "unequal"):
        noise = np.full(MEASURED, 0.1) if kind == "equal" else np.exp(rng.uniform(np.log(0.02), np.log(0.5), MEASURED))
        y = truth[:, mask] + noise * rng.normal(size=(count, MEASURED))
        gain = prior[:, mask] @ np.linalg.inv(prior[np.ix_(mask, mask)] + np.diag(noise**2))
        exact_mean, exact_std = y @ gain.T, np.sqrt(np.diag(prior - gain @ prior[mask]))
        full_y, full_noise = np.zeros((count, SIZE**2)), np.ones(SIZE**2)
        full_y[:, mask], full_noise[mask] = y, noise
        shape = (SIZE, SIZE, 1)
        measurement = Measurement(
            masked(mask.reshape(shape)),
            np.repeat(full_y.reshape(count, *shape), draws, axis=0).astype(np.float32),
            full_noise.reshape(shape).astype(np.float32),
        )
        base = denoiser()
        multistep = sampling.dpm_solver_pp(2)
        known, white = covariances.fourier(examples), covariances.white()
        given_y = known.given(measurement, shape)
        methods = {
            f"Jacobian, {n} iteration{'s' * (n > 1)}": (posterior.mmps(base, measurement, iterations=n), 3 + 2 * n)
            for n in (1, 3, 10, 32)
        }
        methods["covariance of 3,000 examples"] = (posterior.mmps(base, measurement, known, given_y=given_y), 1)
        methods["the same, solved at each step"] = (posterior.mmps(base, measurement, known), 1)
        methods["white covariance"] = (posterior.mmps(base, measurement, white), 1)
        schedule = schedules.edm_steps(STEPS)
        x_T = jax.random.normal(jax.random.key(1), (count * draws, *shape))
        print(f"\n{kind} noise{'':22} mean   deviation   chi^2   calls   seconds")
        draw = jax.jit(functools.partial(sampling.sample, sampler=multistep))
        for name, (conditional, calls) in methods.items():
            draw(jax.random.key(0), schedule, conditional, x_T).block_until_ready()
            start = time.perf_counter()
            x = np.asarray(draw(jax.random.key(2), schedule, conditional, x_T))
            seconds = time.perf_counter() - start
            chi = float(measurement.chi_squared(x).mean())
            x = x.reshape(count, draws, -1)
            squares = ((x.mean(axis=1) - exact_mean) / exact_std) ** 2
            of_samples = (x.var(axis=1, ddof=1) / exact_std**2).mean() / draws  # the error of a mean of few samples
            error = np.sqrt(max(squares.mean() - of_samples, 0.0))
            ratio = np.sqrt((x.var(axis=1, ddof=1) / exact_std**2).mean())
            print(f"{name:33} {error:6.3f} {ratio:9.3f} {chi:9.2f} {calls * STEPS:7} {seconds:8.1f}", flush=True)
        chi = np.mean((y[:, None] - exact_mean[:, None, mask]) ** 2 / noise**2)
        chi += np.mean(np.diag(prior - gain @ prior[mask])[mask] / noise**2)
        print(f"{'exact':33} {0:6.3f} {1:9.3f} {chi:9.2f}")


if __name__ == "__main__":
    main()
