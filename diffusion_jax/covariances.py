"""The covariance of x_0 given x_t, from a covariance C of the data: V = (C^-1 + (alpha / sigma)^2 I)^-1.

    white               C = std^2 I
    from_eigenvectors   a known C
    principal           C of examples, by their principal components
    fourier             C of examples on a periodic grid: for each frequency a matrix over the channels and the other axes

`posterior.mmps` takes a `Covariance` in place of the network's Jacobian. V is exact for Gaussian data, and needs no
derivative of a network (Rissanen et al. 2024, arXiv 2410.11149, start from it).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.denoiser import as_node
from diffusion_jax.errors import require_number
from diffusion_jax.measurements import LinearMap, Measurement, on_host
from diffusion_jax.schedules import NoiseLevel

LARGEST = 4096  # rows of the dense matrices that are factorized: 134 MB in float64, and a minute on two cores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Covariance:
    """A covariance C of x_0 by its eigenvectors, as a pytree.

    variances: eigenvalues, shaped like the coefficients of one example. to_basis: from x_0 [B, *spatial, C] to coefficients
    in an orthonormal basis of eigenvectors; from_basis: from coefficients to x_0. rest: the eigenvalue of all directions that
    the basis lacks.
    """

    variances: Float[ArrayLike, "..."]
    to_basis: LinearMap
    from_basis: LinearMap
    rest: Float[ArrayLike, ""] = 0.0

    def __post_init__(self):
        object.__setattr__(self, "to_basis", as_node(self.to_basis))
        object.__setattr__(self, "from_basis", as_node(self.from_basis))

    def times(self, x: Any, level: NoiseLevel | None = None) -> Any:
        """Returns C x for x [B, *spatial, C]; at the noise level of an x_t, V x. Without a level, NumPy stays NumPy."""
        coefficients, rest = self.to_basis(x), _given_x_t(self.rest, level, x)
        excess = _given_x_t(self.variances, level, coefficients) - _given_x_t(self.rest, level, coefficients)
        return rest * x + self.from_basis(excess * coefficients)

    def variance(self, level: NoiseLevel) -> Float[Array, "..."]:
        """Returns the variance of x_0 given x_t by the largest eigenvalue of C, a number or [B]."""
        largest = jnp.max(jnp.append(jnp.ravel(jnp.asarray(self.variances)), jnp.asarray(self.rest)))
        return jnp.asarray(_given_x_t(largest, level, level.alpha.reshape(-1) if level.alpha.ndim else level.alpha))

    def given(self, measurement: Measurement, shape: Sequence[int]) -> Covariance | None:
        """Returns the covariance of x_0 [*shape] given y, for Gaussian data.

        The covariance depends neither on y nor on x_t: its `times` at a noise level multiplies by the covariance of x_0 given
        y and x_t, (V^-1 + A^T R^-1 A)^-1, without solving a linear system. It is computed in float64, from the matrix of A.
        Returns None if x_0 or y has more than `LARGEST` numbers, if the noise is a function or differs between the rows of y,
        and for traced arrays.
        """
        size, operator, y_shape = math.prod(shape), measurement.operator, measurement.y.shape[1:]
        if max(size, math.prod(y_shape)) > LARGEST or callable(measurement.noise):
            return None
        noise, leaves = on_host(measurement.noise), jax.tree.leaves((self, operator))
        if noise is None or any(on_host(leaf) is None for leaf in leaves):
            return None
        noise = noise[0] if noise.ndim > len(y_shape) and len(noise) == 1 else noise
        if noise.ndim > len(y_shape):
            return None
        unit = np.eye(size).reshape(size, *shape)
        with jax.ensure_compile_time_eval():
            columns = np.asarray(operator.linear(jnp.asarray(unit, jnp.float32)), np.float64)
            diagonal = True if operator.diagonal is None else np.asarray(operator.diagonal) > 0
        measured = np.broadcast_to(diagonal & np.isfinite(noise), (1, *y_shape))[0].ravel()
        a = columns.reshape(size, -1).T[measured]
        r = np.diag(np.broadcast_to(np.square(noise, dtype=np.float64), y_shape).ravel()[measured])
        prior = self.times(unit).reshape(size, size)
        products = a @ prior
        posterior = prior - products.T @ np.linalg.solve(products @ a.T + r, products)
        variances, vectors = np.linalg.eigh((posterior + posterior.T) / 2)
        return from_eigenvectors(np.maximum(variances, 0.0), vectors.T.reshape(size, *shape))


def _given_x_t(variances, level, like):
    """Returns v sigma^2 / (v alpha^2 + sigma^2) for the eigenvalues v of C, or v without a level, to multiply `like`."""
    if level is None:
        return np.asarray(variances)
    dtype = jnp.finfo(like.dtype).dtype  # real, for complex coefficients
    v = jnp.asarray(variances, dtype)
    alpha, sigma = (
        jnp.asarray(each, dtype).reshape([-1, *[1] * (like.ndim - 1)] if jnp.ndim(each) else ())
        for each in (level.alpha, level.sigma)
    )
    return v * sigma**2 / jnp.where(v > 0, v * alpha**2 + sigma**2, 1.0)


def from_eigenvectors(
    variances: Float[ArrayLike, "r"], vectors: Float[ArrayLike, "r *shape"], rest: float = 0.0
) -> Covariance:
    """Returns the covariance with orthonormal eigenvectors, and the eigenvalue `rest` for all other directions."""
    to_basis, from_basis = (jax.tree_util.Partial(function, vectors) for function in (_to_vectors, _from_vectors))
    return Covariance(variances, to_basis, from_basis, rest)


def white(std: float = 1.0) -> Covariance:
    """Returns the covariance std^2 I, for data without known structure. Raises: ValueError for a std that is not above 0."""
    require_number("std", std, 0, above=True)
    return Covariance(np.zeros(0), _to_nothing, _from_nothing, float(std) ** 2)


def _to_nothing(x):
    return x.reshape(len(x), -1)[:, :0]


def _from_nothing(coefficients):
    return coefficients.sum()  # 0


def principal(
    examples: Float[ArrayLike, "N *shape"],
    inputs: Float[ArrayLike, "N K"] | None = None,
    *,
    components: int | None = None,
) -> Covariance:
    """Returns the covariance of examples by their principal components, in float64.

    inputs: what the network gets beside x_t, such as one-hot labels or condition vectors; the result is the covariance of the
    residuals of a linear regression on `inputs`. components: how many components have their own eigenvalue, all by default;
    the other directions have their mean eigenvalue. The eigenvalues are shrunk towards their mean by oracle approximating
    shrinkage (Chen et al. 2010, eq. 23), with a warning if the mean has more than half of the weight.
    Raises: ValueError for fewer than 3 examples more than inputs, examples that are not finite, and bad components.
    """
    x, degrees = _residuals(examples, inputs)
    count, shape = len(x), x.shape[1:]
    x = x.reshape(count, -1)
    size = x.shape[1]
    if components is not None:
        require_number("components", components, 1, size, whole=True)
    if size <= count:
        variances, vectors = np.linalg.eigh(x.T @ x / degrees)
        vectors = vectors.T
    else:  # the rows span fewer directions than there are
        variances, left = np.linalg.eigh(x @ x.T / degrees)
        variances, left = variances[-degrees:], left[:, -degrees:]
        vectors = (left / np.sqrt(np.maximum(variances, np.finfo(float).tiny) * degrees)).T @ x
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[::-1]
    padded = np.concatenate([variances, np.zeros(size - len(variances))])
    shrunk = _shrink(padded, degrees)
    used = min(len(vectors), size if components is None else components)
    rest = float(shrunk[used:].mean()) if used < size else 0.0
    return from_eigenvectors(shrunk[:used], vectors[:used].reshape(used, *shape), rest)


def fourier(
    examples: Float[ArrayLike, "N *spatial C"],
    inputs: Float[ArrayLike, "N K"] | None = None,
    *,
    axes: Sequence[int] | None = None,
) -> Covariance:
    """Returns the covariance of examples whose distribution does not change when they are shifted along periodic axes.

    inputs: as `principal`. axes: the periodic axes, counted from 0 at the first spatial axis; all spatial axes by default.
    For each frequency the covariance is a matrix over the channels and the other axes, shrunk as in `principal`.
    Raises: ValueError as `principal`, and for examples without spatial axes.
    """
    x, degrees = _residuals(examples, inputs)
    axes = tuple(range(x.ndim - 2)) if axes is None else tuple(axes)
    if not axes or not set(axes) <= set(range(x.ndim - 2)) or len(set(axes)) < len(axes):
        raise ValueError(f"axes must be different spatial axes from 0 to {x.ndim - 3}, at least one; got {axes}")
    to_frequencies, _ = _fourier_maps(x.shape[1:], axes)
    found = to_frequencies(x)
    found = np.moveaxis(found, 0, -2)  # [*frequencies, N, q]
    variances, vectors = np.linalg.eigh(np.swapaxes(found, -1, -2) @ found.conj() / degrees)
    variances = _shrink(np.maximum(variances, 0.0), degrees)
    to_basis, from_basis = _fourier_basis(x.shape[1:], axes)
    return Covariance(variances, jax.tree_util.Partial(to_basis, vectors), jax.tree_util.Partial(from_basis, vectors))


def _residuals(examples, inputs):
    """Returns (residuals of examples on a constant and the inputs [N, *shape], their degrees of freedom)."""
    x = np.asarray(examples, np.float64)
    if x.ndim < 2 or not np.isfinite(x).all():
        raise ValueError(f"examples must be finite and [N, ..., C]; got {x.shape}")
    known = np.ones((len(x), 1))
    if inputs is not None:
        inputs = np.asarray(inputs, np.float64)
        if inputs.ndim != 2 or len(inputs) != len(x) or not np.isfinite(inputs).all():
            raise ValueError(f"inputs must be finite and [{len(x)}, K], a row for each example; got {inputs.shape}")
        known = np.concatenate([known, inputs], axis=1)
    axes, sizes, _ = np.linalg.svd(known, full_matrices=False)
    axes = axes[:, sizes > 1e-9 * sizes[0]]
    degrees = len(x) - axes.shape[1]
    if degrees < 2:
        raise ValueError(f"{len(x)} examples with {axes.shape[1] - 1} independent inputs; give more examples")
    flat = x.reshape(len(x), -1)
    return (flat - axes @ (axes.T @ flat)).reshape(x.shape), degrees


def _shrink(variances, degrees):
    """Returns eigenvalues [..., q] of sample covariances, shrunk towards their mean (Chen et al. 2010, eq. 23)."""
    size = variances.shape[-1]
    if size == 1:
        return variances
    total, squares = variances.sum(-1, keepdims=True), np.square(variances).sum(-1, keepdims=True)
    spread = (degrees + 1 - 2 / size) * (squares - total**2 / size)
    share = ((1 - 2 / size) * squares + total**2) / np.where(spread > 0, spread, 1.0)
    share = np.where(spread > 0, np.minimum(share, 1.0), 1.0)
    if (typical := float(np.median(share))) > 0.5:
        warnings.warn(
            f"a covariance of {size} numbers from {degrees + 1} examples is uncertain, so {typical:.0%} of it is replaced by "
            "white noise; give more examples",
            stacklevel=3,
        )
    return (1 - share) * variances + share * total / size


def _to_vectors(vectors, x):
    with jax.default_matmul_precision("highest"):
        return x.reshape(len(x), -1) @ _like(vectors, x).reshape(len(vectors), -1).T


def _from_vectors(vectors, coefficients):
    with jax.default_matmul_precision("highest"):
        flat = coefficients @ _like(vectors, coefficients).reshape(len(vectors), -1)
    return flat.reshape(-1, *vectors.shape[1:])


def _like(values, x):
    """Returns values as a NumPy or JAX array, as x, with the dtype of x."""
    return x.__array_namespace__().asarray(values, dtype=x.dtype)


@functools.cache  # one function for each shape, so that jax.jit compiles once
def _fourier_maps(shape, axes):
    """Returns functions from x [B, *shape] to the coefficients [B, *frequencies, q] of the q other numbers, and back."""
    others = [axis for axis in range(len(shape)) if axis not in axes]
    order = [0, *(1 + axis for axis in (*axes, *others))]
    back = list(np.argsort(order))
    sizes = [shape[axis] for axis in axes]
    over = tuple(range(1, 1 + len(axes)))

    def to_frequencies(x):
        xp = x.__array_namespace__()
        x = xp.transpose(x, order)
        found = xp.fft.rfftn(x, axes=over, norm="ortho")
        return found.reshape(*found.shape[: 1 + len(axes)], -1)

    def from_frequencies(coefficients):
        xp = coefficients.__array_namespace__()
        found = coefficients.reshape(*coefficients.shape[:-1], *(shape[axis] for axis in others))
        return xp.transpose(xp.fft.irfftn(found, s=sizes, axes=over, norm="ortho"), back)

    return to_frequencies, from_frequencies


@functools.cache
def _fourier_basis(shape, axes):
    """Returns functions (eigenvectors [*frequencies, q, q], x) -> coefficients, and back."""
    to_frequencies, from_frequencies = _fourier_maps(shape, axes)

    def to_basis(vectors, x):
        found = to_frequencies(x)
        with jax.default_matmul_precision("highest"):
            return (found[..., None, :] @ _like(vectors.conj(), found))[..., 0, :]

    def from_basis(vectors, coefficients):
        with jax.default_matmul_precision("highest"):
            found = coefficients[..., None, :] @ _like(vectors, coefficients).swapaxes(-1, -2)
        return from_frequencies(found[..., 0, :])

    return to_basis, from_basis
