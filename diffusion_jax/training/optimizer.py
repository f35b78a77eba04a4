"""The config's optax optimizer, and the parameters' moving average (EMA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.config.rules import freezes
from diffusion_jax.functions import find_function

MAX_INITIAL_SHARE = 0.1  # an EMA is used only if the random initial parameters have at most this weight in it


# {name: (largest learning rate, number of steps after the warm-up) -> optax schedule after the warm-up}
_SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, _: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": optax.cosine_decay_schedule,
}


def learning_rate(config: Mapping[str, Any]) -> optax.Schedule:
    """Builds the learning rate: linear warm-up from 0, then constant, or a linear or cosine decay to 0 at `decay_steps`.

    config: `config.optimizer`; `decay_steps` must be above `warmup_steps`.
    """
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    steps = 0 if config["schedule"] == "constant" else config["decay_steps"] - warmup
    after = _SCHEDULES[config["schedule"]](peak, steps)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def from_config(config: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of `config.optimizer`: global-norm clipping (0 for none), then Adam, AdamW or a user's optimizer.

    `update` takes the gradient's norm as the keyword argument `grad_norm`, because the metrics need it, too. Frozen
    parameters have no optimizer state, and updates of 0.
    """
    if ":" in config["name"]:
        update = find_function(config["name"], "optimizer.name")(learning_rate(config), config)
    else:
        options = {name: config[name] for name in ("b1", "b2", "eps")}
        if config["name"] == "adamw":
            options["weight_decay"] = config["weight_decay"]
        update = getattr(optax, config["name"])(learning_rate(config), **options)  # only names in optax are allowed
    max_norm = config["grad_clip"]
    optimizer = optax.with_extra_args_support(optax.chain(_clip(max_norm), update) if max_norm else update)
    if not config["frozen"]:
        return optimizer
    return optax.multi_transform(
        {False: optimizer, True: optax.set_to_zero()}, lambda params: find_frozen(config["frozen"], params)
    )


def find_frozen(frozen: str | Sequence[str], params: Any) -> Any:
    """Returns a tree of bools, True for parameters that training does not change.

    frozen: patterns such as "down_*", compared with the names of parameters, "down_0_block_0/conv_0/kernel", and with the
    names of all modules that contain them; or "module:function", a function from a parameter's name to a bool.
    Raises: ValueError if a pattern freezes no parameter, and if no parameter or every parameter is frozen.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(getattr(entry, "key", entry)) for entry in path), params
    )
    every = jax.tree.leaves(names)
    some = f"some of the {len(every)} parameters: {', '.join(every[:: max(1, len(every) // 3)])}"
    if isinstance(frozen, str):
        chosen = set(filter(find_function(frozen, "optimizer.frozen"), every))
    else:
        chosen = set()
        for pattern in frozen:
            matching = {name for name in every if freezes(pattern, name)}
            if not matching:
                raise ValueError(f"optimizer.frozen: {pattern!r} freezes no parameter; {some}")
            chosen |= matching
    if not 0 < len(chosen) < len(every):
        which = "every parameter" if chosen else "no parameter"
        raise ValueError(f"optimizer.frozen={frozen!r} freezes {which}; {some}")
    return jax.tree.map(lambda name: name in chosen, names)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Like `optax.clip_by_global_norm`, but `update` takes the norm as an argument."""

    def update(updates, state, params=None, **extra_args):
        del params
        norm = extra_args["grad_norm"]
        # XLA fuses a product into the update, but would write a quotient to memory for each leaf.
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# ---- EMA


def ema_decay(step: Any, config: Mapping[str, Any]) -> Any:
    """Returns the EMA decay at a step: `decay`, or with `warmup` min(decay, (1 + step) / (10 + step))."""
    if not config["warmup"]:
        return config["decay"]
    minimum = jnp.minimum if isinstance(step, jax.Array) else np.minimum
    return minimum(config["decay"], (1.0 + step) / (10.0 + step))


def initial_share(config: Mapping[str, Any], step: int) -> float:
    """Returns the weight of the random initial parameters in the EMA after `step` steps: the product of the decays.

    config: complete. With `init_from` the result is 0, because the initial parameters were trained before.
    """
    if config["init_from"]:
        return 0.0
    if not config["ema"]["warmup"]:
        return config["ema"]["decay"] ** step
    # With a warm-up, the product of the first 10,000 decays is below 1e-30.
    return float(np.prod(ema_decay(np.arange(min(step, 10_000)), config["ema"])))


def weights_kind(config: Mapping[str, Any], step: int, use_ema: bool = True) -> Literal["ema", "raw"]:
    """Returns which weights to use for samples and metrics after `step` steps: "ema" or "raw".

    If the random initial parameters weigh more than `MAX_INITIAL_SHARE` in the EMA, its samples would be noise: use "raw".
    """
    return "ema" if use_ema and initial_share(config, step) <= MAX_INITIAL_SHARE else "raw"
