"""Compares posterior samples with the exact posterior of Gaussian fields, as docs/results/benchmarks.md shows.

    python benchmarks/posterior.py --steps=200 --samples=192

A periodic 16 x 16 field with spectrum (1 + k)^-3 and mean variance 1 is measured with noise 0.1, and a field with a squared
exponential covariance (length 3) by a blur. The denoiser is exact, so that only the method and the steps err. Printed for
each covariance: the ratio of the sampled and the exact deviation; the error of the mean in posterior deviations (root mean
square), also without the error from the number of samples; chi-squared for each measured number; CPU seconds after
compilation.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import Denoiser, covariances, measurements, posterior, sampling, schedules
from diffusion_jax.measurements import LinearOperator, Measurement

SIZE, NOISE = 16, 0.1
SHAPE = (SIZE, SIZE, 1)
PATH = schedules.edm(0.002, 80.0)


def spectrum(kind: str) -> np.ndarray:
    """The variance of each Fourier coefficient, with mean 1."""
    k = np.fft.fftfreq(SIZE, 1 / SIZE)
    distance = np.minimum(np.arange(SIZE), SIZE - np.arange(SIZE))
    if kind == "power law":
        power = (1 + np.hypot(k[:, None], k)) ** -3
    else:
        power = np.maximum(np.fft.fft2(np.exp(-(distance[:, None] ** 2 + distance**2) / 18)).real, 1e-8)
    return power / power.mean()


def filtered(gain: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiplies the Fourier coefficients of fields [n, 16, 16, 1]."""
    return np.fft.ifft2(gain[..., None] * np.fft.fft2(x, axes=(1, 2)), axes=(1, 2)).real


def denoiser(power: np.ndarray) -> Denoiser:
    """The exact denoiser of fields."""
    variances = jnp.asarray(power)[None, :, :, None]

    def network(x_t, time):
        level = PATH.at(time, x_t)
        gain = level.alpha * variances / (level.alpha**2 * variances + level.sigma**2)
        return jnp.fft.ifft2(gain * jnp.fft.fft2(x_t, axes=(1, 2)), axes=(1, 2)).real

    return Denoiser(network, prediction="x_0", clip=False)


def gaussian_kernel(size: int) -> np.ndarray:
    """A blur with standard deviation 1.5."""
    line = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / 1.5) ** 2)
    return (np.outer(line, line) / line.sum() ** 2).astype(np.float32)


CASES = {
    "blur": ("power law", measurements.blur(gaussian_kernel(9), "wrap")),
    "cumulative sums": ("power law", LinearOperator(lambda x: jnp.cumsum(x.reshape(len(x), -1), axis=1) / 4)),
    "4x4 means": ("power law", measurements.average_pool(4)),
    "points": ("power law", measurements.masked(np.random.default_rng(0).random(SHAPE) < 0.125)),
    "blur, smooth field": ("squared exponential", measurements.blur(gaussian_kernel(7), "wrap")),
}


def main() -> None:
    """Prints a row for each measurement and covariance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=192)
    options = parser.parse_args()
    count, size = options.samples, SIZE**2
    print(f"{count} samples, {options.steps} steps of DPM-Solver++ 2M, float32, {jax.devices()[0].device_kind}")
    print(f"{'measurement':20} {'covariance':24} deviation   mean (without Monte Carlo)   chi^2   CPU s")
    for name, (kind, operator) in CASES.items():
        rng, power = np.random.default_rng(1), spectrum(kind)
        unit = np.eye(size).reshape(size, *SHAPE)
        prior = filtered(power, unit).reshape(size, size)
        examples, truth = (filtered(np.sqrt(power), rng.normal(size=(n, *SHAPE))) for n in (3000, 1))
        a = np.asarray(operator.linear(jnp.asarray(unit, jnp.float32)), np.float64).reshape(size, -1).T
        y = np.asarray(operator.measure(truth.astype(np.float32)))
        y = (y + NOISE * rng.normal(size=y.shape)).astype(np.float32)
        kept = np.square(a).sum(axis=1) > 0
        gain = prior @ a[kept].T @ np.linalg.inv(a[kept] @ prior @ a[kept].T + NOISE**2 * np.eye(kept.sum()))
        mean, deviation = gain @ y.ravel()[kept], np.sqrt(np.diag(prior - gain @ a[kept] @ prior))
        variances, vectors = np.linalg.eigh(prior)
        exact = covariances.from_eigenvectors(np.maximum(variances, 0), vectors.T.reshape(size, *SHAPE))
        estimate = covariances.fourier(examples)
        base, one = denoiser(power), Measurement(operator, y, NOISE)
        repeated = Measurement(operator, np.repeat(y, count, axis=0), NOISE)
        methods = {
            "exact": posterior.mmps(base, repeated, exact, given_y=exact.given(one, SHAPE)),
            "3,000 examples": posterior.mmps(base, repeated, estimate, given_y=estimate.given(one, SHAPE)),
            "3,000 examples, solved": posterior.mmps(base, repeated, estimate),
            "Jacobian, 3 iterations": posterior.mmps(base, repeated),
            "Jacobian, 60 iterations": posterior.mmps(base, repeated, iterations=60),
        }
        schedule, x_T = schedules.edm_steps(options.steps), jax.random.normal(jax.random.key(1), (count, *SHAPE))
        draw = jax.jit(lambda *arguments: sampling.sample(*arguments, sampler=sampling.dpm_solver_pp(2)))
        for method, given in methods.items():
            draw(jax.random.key(0), schedule, given, x_T).block_until_ready()
            start = time.process_time()
            x = np.asarray(draw(jax.random.key(2), schedule, given, x_T))
            seconds = time.process_time() - start
            chi_squared = float(repeated.chi_squared(x).mean())
            x = x.reshape(count, size).astype(np.float64)
            ratio = np.sqrt(np.mean(x.var(axis=0, ddof=1) / deviation**2))
            error = np.sqrt(np.mean(((x.mean(axis=0) - mean) / deviation) ** 2))
            without = np.sqrt(max(error**2 - ratio**2 / count, 0))
            print(
                f"{name:20} {method:24} {ratio:9.4f} {error:6.3f} ({without:.3f}) {chi_squared:20.3f} {seconds:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
