"""Types for the signatures of the core. Imports nothing else from this package.

Shapes are written as in jaxtyping: `Float[ArrayLike, "B *shape"]` is a batch of B float arrays with any shape. The
annotations have no run-time cost; the tests check them with jaxtyping's import hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Integer, Key

# A batch of float arrays with any shape: as a result, and as an argument.
Batch: TypeAlias = Float[Array, "B *shape"]
BatchLike: TypeAlias = Float[ArrayLike, "B *shape"]

# A schedule index for each row of a batch, or one index for all rows.
Index: TypeAlias = Integer[ArrayLike, "B"] | Integer[ArrayLike, ""]

# A network time for each row of a batch, or one time for all rows.
Time: TypeAlias = Float[ArrayLike, "B"] | Float[ArrayLike, ""]

# How a predicted x_0 is limited: True clips to [-1, 1], False does nothing, a function x_0 -> x_0 replaces the clip.
Clip: TypeAlias = bool | np.bool_ | Callable[[jax.Array], ArrayLike]


@runtime_checkable
class DenoiseFn(Protocol):
    """A network as the core calls it: (x_t float [B, ...], network time float [B]) -> output.

    The output has the shape of x_t, or twice its channels for a learned variance.
    """

    def __call__(self, x_t: Batch, time: Float[Array, "B"], /) -> ArrayLike: ...


# A classifier of noisy images: (x_t float [B, ...], network time float [B]) -> logits float [B, K].
LogitsFn: TypeAlias = DenoiseFn

# log p(y | x_t) of a condition y: (x_t float [B, ...], network time float [B]) -> float [B], differentiable in x_t.
LogProbFn: TypeAlias = Callable[[Batch, Float[Array, "B"]], Float[Array, "B"]]


@runtime_checkable
class TimestepSampler(Protocol):
    """Draws the noise levels of a training batch: (key, batch_size, levels) -> (t [B], density [B]), as in `timesteps`.

    levels: the number of a schedule's steps, for indices t and weights; or a `Path`, for network times and log densities.
    """

    def __call__(
        self, key: Key[Array, ""], batch_size: int, levels: Any, /
    ) -> tuple[Int[Array, "B"] | Float[Array, "B"], Float[ArrayLike, "B"]]: ...


LevelDraw = TimestepSampler  # the name of timestep samplers for paths in version 0.3
