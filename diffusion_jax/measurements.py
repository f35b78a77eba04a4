"""Linear measurements y = A(x_0) + noise of examples [B, *spatial, C], and ready-made operators A.

    masked            known entries                     gray, mix_channels   fixed sums over channels
    average_pool      means over blocks                 blur                 a convolution with any kernel
    decimate          every n-th entry of each axis     at_points            linear interpolation at sensors
    fourier           chosen Fourier coefficients       radon                sums along rays, for two axes

Operators act on examples with one, two or three spatial axes, unless stated otherwise, and `compose` joins two operators. Any
linear function is an operator, too; its adjoint is found by `jax.linear_transpose`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from diffusion_jax.arrays import as_float, broadcasts_to
from diffusion_jax.denoiser import as_node
from diffusion_jax.errors import require_known
from diffusion_jax.types import Batch, BatchLike

LinearMap: TypeAlias = Callable[[BatchLike], Float[Array, "B *result_shape"]]
_NUM_PROBES = 16
_LINEARITY = 1e-2  # the largest relative difference of products that count as equal; TF32 has 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearOperator:
    """A linear measurement A as a pytree: new values of its arrays, such as a mask, cause no recompilation.

    measure: A, from [B, *spatial, C] to y [B, ...], row by row; it may add a constant, as a change of units does. invert: a
    right inverse A+, with A A+ = I on the range of A; None if there is none. diagonal: the diagonal of A A^T, a number or an
    array that broadcasts to y. Entries of y with a diagonal of 0 are hidden: they are ignored. For other entries an
    approximate diagonal suffices, but slows down iterative solvers. If `diagonal` is None, it is estimated from 16 products
    with A, and no entry of y is hidden.
    """

    measure: LinearMap
    invert: LinearMap | None = None
    diagonal: ArrayLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "measure", as_node(self.measure))
        object.__setattr__(self, "invert", as_node(self.invert))

    def linear(self, x: Batch) -> Float[Array, "B *y_shape"]:
        """Returns A(x) - A(0)."""
        return jax.jvp(self.measure, (jnp.zeros_like(x),), (x,))[1]

    def adjoint(self, like: Batch) -> LinearMap:
        """Returns the transposed `linear`, from [B, ...] to the shape of `like`, [B, *spatial, C]."""
        transposed = jax.linear_transpose(self.linear, jax.ShapeDtypeStruct(like.shape, like.dtype))
        return lambda u: transposed(u)[0]

    def check(self, shape: Sequence[int]) -> None:
        """Checks that A is linear, or linear with a constant, and acts row by row on examples [*shape]; skips traced arrays.

        Warns of a constant. Raises: ValueError for another function, and for one that jax cannot trace or that returns no
        floats.
        """
        if any(on_host(leaf) is None for leaf in jax.tree.leaves(self)):
            return
        with jax.ensure_compile_time_eval():
            rng = np.random.default_rng(0)
            x, z = (10 * rng.standard_normal((1, *shape)).astype(np.float32) for _ in range(2))
            try:
                rows = _measure(self, np.concatenate([x, z]))
                offset, of_sum, linear = _measure(self, 0 * x), _measure(self, x + z), _linear(self, x)
                alone = _measure(self, x)
            except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
                raise ValueError(
                    "the operator is no function of jax arrays; use jax.numpy in place of numpy, and no if on values"
                ) from error
        for found, count in ((rows, 2), (alone, 1)):
            if not isinstance(found, jax.Array) or not jnp.issubdtype(found.dtype, jnp.floating) or len(found) != count:
                raise ValueError(f"the operator must return a float array [B, ...]; it returned {_describe(found)}")
        rows, offset, of_sum, linear, alone = (
            np.asarray(each, np.float64) for each in (rows, offset, of_sum, linear, alone)
        )
        allowed = _LINEARITY * np.abs(alone - offset).max() + 1e-5 * np.abs(alone).max()
        if rows.shape[1:] != alone.shape[1:] or np.abs(rows[:1] - alone).max() > allowed:
            raise ValueError("the operator must be linear row by row, but a row of A(x_0) depends on other rows of x_0")
        if not (np.abs(of_sum - rows[1:] - alone + offset).max() <= allowed >= np.abs(linear - alone + offset).max()):
            raise ValueError("the operator must be linear: A(x + z) = A(x) + A(z), or this with a constant; it is not")
        if np.abs(offset).max() > 1e-5 * np.abs(alone).max():
            warnings.warn(
                f"the operator adds a constant, from {offset.min():.3g} to {offset.max():.3g}; it is subtracted from y",
                stacklevel=3,
            )

    def squared_norms(self, like: Batch) -> Float[Array, "..."]:
        """Returns `diagonal`, or its estimate for examples in the shape of `like`, [B, *spatial, C]."""
        if self.diagonal is not None:
            return jnp.asarray(self.diagonal, like.dtype)
        probes = jax.random.normal(jax.random.key(0), (_NUM_PROBES, *like.shape[1:]), like.dtype)
        return jnp.mean(jnp.square(self.linear(probes)), axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """A measurement y = A(x_0) + N(0, R), as a pytree: a new y or noise causes no recompilation.

    operator: a `LinearOperator`, or any linear function of x_0. y: [B, ...], a row for each example; entries where the
    operator's `diagonal` is 0, such as the unknown pixels of `masked`, are ignored. noise: the standard deviation, one number
    or an array that broadcasts to y (the error bars of each pixel or channel), infinite for entries that are not measured; or
    a function u -> R u, with the covariance R and u shaped like y. A noise of 0 is for `editing.project` only.
    """

    operator: LinearOperator
    y: Float[Array, "B *y_shape"]
    noise: Any = 0.0

    def __post_init__(self):
        # JAX makes copies with other leaves, such as axes or derivatives, so `check` and not this method checks values.
        if not isinstance(self.operator, LinearOperator):
            object.__setattr__(self, "operator", LinearOperator(self.operator))
        if isinstance(self.noise, list | tuple):
            object.__setattr__(self, "noise", np.asarray(self.noise))
        if callable(self.noise):
            object.__setattr__(self, "noise", as_node(self.noise))

    @property
    def is_measured(self) -> Bool[Array, "..."]:
        """Whether entries of y are measured: a finite noise and a `diagonal` above 0; broadcasts to y."""
        diagonal = self.operator.diagonal
        found = jnp.asarray(True if diagonal is None else jnp.asarray(diagonal) > 0)
        noise: Any = self.noise
        return found if callable(noise) else found & jnp.isfinite(jnp.asarray(noise))

    def check(self) -> None:
        """Checks y and the noise, except traced values.

        Raises: ValueError for a y that is not float, or not finite where it is measured; a noise that is not above 0, or does
          not broadcast to y; a noise function that is not symmetric or not positive.
        """
        y, noise = as_float("y", self.y), self.noise
        if not callable(noise):
            if not broadcasts_to(shape := jnp.shape(noise), y.shape):
                raise ValueError(f"noise has shape {shape}, which does not broadcast to y {y.shape}")
            if (std := on_host(noise)) is not None and not (std > 0).all():
                raise ValueError(
                    "noise is a standard deviation above 0; without noise, use diffusion_jax.editing.project"
                )
        elif all(on_host(leaf) is not None for leaf in jax.tree.leaves(noise)):
            _check_covariance(noise, y)
        if (values := on_host(y)) is not None and not np.isfinite(values).all():
            with jax.ensure_compile_time_eval():
                measured = on_host(self.is_measured)
            if measured is not None and not np.isfinite(values[np.broadcast_to(measured, values.shape)]).all():
                raise ValueError(
                    "y has values that are not finite; hide them with an operator such as measurements.masked, or an "
                    "infinite noise"
                )

    def covariance(self, u: Float[Array, "B *y_shape"]) -> Float[Array, "B *y_shape"]:
        """Returns R u for a u that is 0 at hidden entries of y; the result is 0 at these entries, too."""
        noise: Any = self.noise
        if callable(noise):
            return self._hide(jnp.asarray(noise(u)).astype(u.dtype))
        return self.variances(u.dtype) * u

    def variances(self, dtype: Any) -> Float[Array, "..."]:
        """Returns the diagonal of R, which broadcasts to y, with 1 for infinite noise; for a noise function, an estimate."""
        noise: Any = self.noise
        if not callable(noise):
            noise = jnp.asarray(noise, dtype)
            return jnp.where(jnp.isfinite(noise), jnp.square(noise), 1.0)
        signs = jax.random.rademacher(jax.random.key(1), (_NUM_PROBES, *self.y.shape[1:]), dtype)
        estimate = jnp.mean(signs * jnp.asarray(noise(signs)), axis=0).astype(dtype)
        return jnp.maximum(estimate, 1e-3 * jnp.mean(estimate))

    def residual(self, x_0: Batch) -> Float[Array, "B *y_shape"]:
        """Returns y - A(x_0), and 0 for hidden entries of y. Raises: ValueError if y and A(x_0) differ in shape."""
        found, y = self.operator.measure(x_0), as_float("y", self.y)
        if found.shape != y.shape:
            raise ValueError(
                f"y has shape {y.shape}, but the operator measures {found.shape} for x_0 {x_0.shape}; give each example its "
                "own row of y"
            )
        return self._hide(y.astype(x_0.dtype) - found)

    def _hide(self, u: Float[Array, "B *y_shape"]) -> Float[Array, "B *y_shape"]:
        """Returns u, with 0 at entries that are not measured."""
        return jnp.where(self.is_measured, u, 0.0)

    def chi_squared(self, x_0: BatchLike) -> Float[Array, "B"]:
        """Returns the mean of (y - A(x_0))^2 / R over the measured entries: about 1 for an x_0 that explains y.

        Entries that are not measured do not count. Raises: ValueError as `check` and `residual`, and for a
        noise that is a function.
        """
        self.check()
        if callable(self.noise):
            raise ValueError("chi_squared needs the noise as standard deviations, not as a function")
        x_0 = as_float("x_0", x_0)
        residual = self.residual(x_0)
        is_measured = jnp.broadcast_to(self.is_measured, residual.shape)
        squares = jnp.where(is_measured, jnp.square(residual) / self.variances(x_0.dtype), 0.0)
        axes = tuple(range(1, residual.ndim))
        return jnp.sum(squares, axes) / jnp.maximum(jnp.sum(is_measured, axes), 1)


@jax.jit
def _measure(operator, x):
    return operator.measure(x)


@jax.jit
def _linear(operator, x):
    return operator.linear(x)


def _describe(found):
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, jax.Array) else type(found).__name__


def _check_covariance(noise, y):
    """Raises ValueError if a noise function is no covariance: not symmetric or not positive in random products."""
    with jax.ensure_compile_time_eval():
        u, v = np.random.default_rng(0).standard_normal((2, 1, *y.shape[1:])).astype(np.float32)
        times_u, times_v = (np.asarray(noise(jnp.asarray(each)), np.float64) for each in (u, v))
    u, v = u.astype(np.float64), v.astype(np.float64)
    largest = np.sqrt(np.sum(times_u**2) * np.sum(v**2))
    if abs(np.sum(v * times_u) - np.sum(u * times_v)) > _LINEARITY * largest:
        raise ValueError("noise must be a covariance: u^T R v = v^T R u; the function is not symmetric")
    if min(np.sum(u * times_u), np.sum(v * times_v)) <= 0:
        raise ValueError("noise must be a covariance: u^T R u above 0; the function gives a value below")


def on_host(x: Any) -> np.ndarray | None:
    """Returns an array's values; None for traced arrays, and for arrays with parts on other hosts."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def as_mask(mask: Shaped[ArrayLike, "*shape"]) -> Bool[Array, "*shape"]:
    """Converts a mask to bool. Raises: ValueError for values other than 0 and 1, unless the mask is traced."""
    if not isinstance(mask, Tracer):
        values = np.asarray(mask)
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(
                f"a mask holds 1 where pixels are known and 0 elsewhere, got {other.flat[0]}; use image > 127"
            )
    return jnp.asarray(mask, bool)


def _keep(mask, x):
    x = as_float("x", x)
    if not broadcasts_to(mask.shape, x.shape):
        raise ValueError(f"the mask has shape {mask.shape}, which does not broadcast to the examples, {x.shape}")
    return jnp.where(mask, x, 0.0)


def masked(mask: Shaped[ArrayLike, "..."]) -> LinearOperator:
    """Inpainting: measures the known pixels. y: shaped like the image; A(x_0) is 0 where pixels are unknown."""
    mask = as_mask(mask)
    keep = jax.tree_util.Partial(_keep, mask)
    return LinearOperator(keep, keep, mask.astype(jnp.float32))


@functools.cache
def gray(channels: int = 3) -> LinearOperator:
    """Colorization: measures the mean over the channels. y: [B, *spatial, 1]."""
    return LinearOperator(
        lambda x: jnp.mean(as_float("x", x), axis=-1, keepdims=True),
        lambda y: jnp.broadcast_to(as_float("y", y), (*jnp.shape(y)[:-1], channels)),
        1 / channels,
    )


def _mix(matrix, x):
    x = as_float("x", x)
    return jnp.matmul(x, matrix.astype(x.dtype).T, precision=jax.lax.Precision.HIGHEST)


def mix_channels(matrix: Float[ArrayLike, "K C"]) -> LinearOperator:
    """Measures K weighted sums over the C channels. y: [B, *spatial, K]."""
    matrix = as_float("matrix", matrix)
    invert = jax.tree_util.Partial(_mix, jnp.linalg.pinv(matrix))
    return LinearOperator(jax.tree_util.Partial(_mix, matrix), invert, jnp.sum(jnp.square(matrix), axis=1))


def _blocks(x, factor, axes):
    """Splits each of `axes` spatial axes in two, [n] to [n / factor, factor]. Raises: ValueError for other shapes."""
    if x.ndim != axes + 2:
        raise ValueError(f"this operator takes {axes} spatial axes, [B, *spatial, C]; got {x.shape} (argument axes)")
    if any(size % factor for size in x.shape[1:-1]):
        sizes = "x".join(map(str, x.shape[1:-1]))
        raise ValueError(f"images of {sizes} cannot be divided into squares of {factor} pixels")
    halves = (part for size in x.shape[1:-1] for part in (size // factor, factor))
    return x.reshape(x.shape[0], *halves, x.shape[-1])


@functools.cache
def average_pool(factor: int, axes: int = 2) -> LinearOperator:
    """Super-resolution: measures block means. A block has `factor` entries along each spatial axis; x_0 has `axes` such axes.

    y: [B, n / factor, ..., C].
    """

    def measure(x):
        return _blocks(as_float("x", x), factor, axes).mean(axis=tuple(range(2, 2 * axes + 1, 2)))

    def invert(y):
        y = as_float("y", y)
        for axis in range(1, axes + 1):
            y = jnp.repeat(y, factor, axis=axis)
        return y

    return LinearOperator(measure, invert, 1 / factor**axes)


@functools.cache
def decimate(factor: int, axes: int = 2) -> LinearOperator:
    """Measures every `factor`-th entry along each of `axes` spatial axes. y: [B, n / factor, ..., C]."""
    first = (slice(None), *[slice(None), 0] * axes)

    def measure(x):
        return _blocks(as_float("x", x), factor, axes)[first]

    def invert(y):
        y = as_float("y", y)
        sizes = [part for size in y.shape[1:-1] for part in (size, factor)]
        spread = jnp.zeros((y.shape[0], *sizes, y.shape[-1]), y.dtype).at[first].set(y)
        return spread.reshape(y.shape[0], *(factor * size for size in y.shape[1:-1]), y.shape[-1])

    return LinearOperator(measure, invert, 1.0)


@functools.cache  # one function for each mode, so that jax.jit compiles once
def _convolution(mode):
    return lambda kernel, x: _convolve(kernel, x, mode)


def _convolve(kernel, x, mode):
    x = as_float("x", x)
    if x.ndim != kernel.ndim + 2:
        raise ValueError(f"a kernel of {kernel.ndim} axes needs as many spatial axes, [B, *spatial, C]; got {x.shape}")
    margins = [((size - 1) // 2, size // 2) for size in kernel.shape]
    if any(max(margin) >= size for margin, size in zip(margins, x.shape[1:-1], strict=True)):
        raise ValueError(f"the kernel {kernel.shape} is too large for examples of {x.shape[1:-1]}")
    padded = jnp.pad(x, ((0, 0), *margins, (0, 0)), mode=mode)
    channels_first = jnp.moveaxis(padded, -1, 1).reshape(-1, 1, *padded.shape[1:-1])
    flipped = jnp.flip(kernel).astype(x.dtype)[None, None]
    blurred = jax.lax.conv_general_dilated(
        channels_first, flipped, (1,) * kernel.ndim, "VALID", precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(blurred.reshape(x.shape[0], x.shape[-1], *x.shape[1:-1]), 1, -1)


def blur(kernel: Float[ArrayLike, "*sizes"], mode: str = "reflect") -> LinearOperator:
    """Measures a convolution of each channel with a kernel, which has an axis for each spatial axis. y: shaped like x_0.

    mode: the values beyond the border, as `jnp.pad`: "reflect", "edge", "wrap" (periodic) or "constant" (0).
    Warns about a kernel whose sum is not 1, such as an edge filter, unless the kernel is traced.
    """
    kernel = as_float("kernel", kernel)
    if (total := on_host(jnp.sum(kernel))) is not None and abs(total - 1) > 1e-3:
        warnings.warn(f"the kernel's sum is {total:g}; for a blur, divide the kernel by its sum", stacklevel=2)
    require_known("mode", mode, ("reflect", "edge", "wrap", "constant"))
    measure = jax.tree_util.Partial(_convolution(mode), kernel)
    return LinearOperator(measure, None, jnp.sum(jnp.square(kernel)))


def _interpolate(points, x):
    x = as_float("x", x)
    if x.ndim != points.shape[1] + 2:
        raise ValueError(
            f"points of {points.shape[1]} numbers need as many spatial axes, [B, *spatial, C]; got {x.shape}"
        )

    if (positions := on_host(points)) is not None:
        inside = (positions >= -0.5) & (positions <= np.array(x.shape[1:-1]) - 0.5)  # False for NaN
        outside = positions[~inside.all(axis=1)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} of {len(points)} points, such as {outside[0]}, lie outside of the grid of {x.shape[1:-1]} "
                "entries; positions start at 0, in the order of the axes"
            )

    def of_channel(values):  # [*spatial]
        return jax.scipy.ndimage.map_coordinates(values, list(points.astype(values.dtype).T), order=1, mode="nearest")

    return jax.vmap(jax.vmap(of_channel, in_axes=-1, out_axes=-1))(x)


def at_points(points: Float[ArrayLike, "P axes"]) -> LinearOperator:
    """Measures P points by linear interpolation between the nearest entries. y: [B, P, C].

    points: a position along each axis, in order: 0 at the first entry, n - 1 at the last. Positions outside are moved to the
    border. Raises: ValueError, when called, for NaN and more than half an entry outside, unless traced (NaN gives NaN).
    """
    points = as_float("points", points)
    if points.ndim != 2:
        raise ValueError(f"points must be [P, axes], a position along each spatial axis; got {points.shape}")
    fraction = points - jnp.floor(points)
    diagonal = jnp.prod(jnp.square(fraction) + jnp.square(1 - fraction), axis=1)[:, None]
    return LinearOperator(jax.tree_util.Partial(_interpolate, points), None, diagonal)


def _transform(mask, x):
    x = as_float("x", x)
    axes = tuple(range(1, x.ndim - 1))
    if tuple(x.shape[1:-1]) != mask.shape:
        raise ValueError(f"the mask of frequencies has shape {mask.shape}, and the examples are {x.shape[1:-1]}")
    half = mask[..., : mask.shape[-1] // 2 + 1, None]
    found = jnp.where(half, jnp.fft.rfftn(x, axes=axes, norm="ortho"), 0.0)
    return jnp.stack([found.real, found.imag], axis=-1)


def fourier(mask: Shaped[ArrayLike, "*spatial"]) -> LinearOperator:
    """Measures chosen coefficients of the orthonormal Fourier transform over all spatial axes, as in MRI.

    mask: 1 for measured frequencies, in the order of `jnp.fft.fftn`; along the last axis, only the first n // 2 + 1
    frequencies count, because the others have conjugate coefficients. y: [B, ..., n // 2 + 1, C, 2], real and imaginary
    parts, each with noise of its own; entries of y that are not measured are ignored.
    """
    mask = as_mask(mask)
    grid = jnp.meshgrid(*(jnp.arange(size) for size in mask.shape), indexing="ij")
    is_real = functools.reduce(jnp.logical_and, [2 * k % n == 0 for k, n in zip(grid, mask.shape, strict=True)])
    measured = jnp.stack([jnp.where(is_real, 1.0, 0.5), jnp.where(is_real, 0.0, 0.5)], axis=-1) * mask[..., None]
    half = measured[..., : mask.shape[-1] // 2 + 1, None, :]
    return LinearOperator(jax.tree_util.Partial(_transform, mask), None, half)


def _project_rays(angles, x):
    x = as_float("x", x)
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"radon takes square images [B, n, n, C], got {x.shape}")
    size = x.shape[1]
    offsets = jnp.arange(size, dtype=x.dtype) - (size - 1) / 2
    along, across = jnp.meshgrid(offsets, offsets, indexing="ij")

    def of_angle(angle):
        rows = jnp.cos(angle) * along + jnp.sin(angle) * across + (size - 1) / 2
        columns = -jnp.sin(angle) * along + jnp.cos(angle) * across + (size - 1) / 2

        def of_channel(values):
            return jax.scipy.ndimage.map_coordinates(values, [rows, columns], order=1, mode="constant").sum(axis=0)

        return jax.vmap(jax.vmap(of_channel, in_axes=-1, out_axes=-1))(x)  # [B, n, C]

    return jnp.moveaxis(jax.vmap(of_angle)(angles.astype(x.dtype)), 0, 1)


def radon(angles: Float[ArrayLike, "A"]) -> LinearOperator:
    """Tomography: measures the sums along parallel rays through square images, at A angles in radians.

    y: [B, A, n, C]; at angle 0, the sums run along the first spatial axis. Values outside of the image are 0.
    """
    return LinearOperator(jax.tree_util.Partial(_project_rays, as_float("angles", angles)))


def _compose(outer, inner, x):
    return outer.measure(inner.measure(x))


def compose(outer: LinearOperator, inner: LinearOperator) -> LinearOperator:
    """Returns the operator outer(inner(x_0)), which has neither a right inverse nor a `diagonal`.

    A mask in `outer` or `inner` hides no entries of y: all must be finite, and `residual` compares masked entries with 0.
    """
    return LinearOperator(jax.tree_util.Partial(_compose, outer, inner))
