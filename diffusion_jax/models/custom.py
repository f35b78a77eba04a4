"""Networks from a user's function: `model.kind` is "module:function", or "FILE.py:function".

    def transformer(shapes: Shapes, *, width: int = 128, depth: int = 4, dropout: float = 0.0) -> nn.Module: ...

The function gets the shapes of the data and returns a Flax Linen module, a Flax NNX module, or a pair `(init, apply)` of
the functions init(key) -> params and apply(params, ...) -> output. A function that returns an NNX module must have an
argument `rngs`. The network receives only the arguments named in its signature, from `(x_t, time, y, condition, extra,
train)`. `apply` may also have an argument `key`, a random key in training and None otherwise. A keyword argument of the
function with the name of a setting in `config.model`, such as `dropout`, gets the value of this setting. All other keyword
arguments, except `rngs`, get their values from `config.model.options`.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.interpreters.partial_eval import dce_jaxpr

from diffusion_jax.config.values import Boolean, Choice, Integer, Number, OneOf, Text, Tuple, optional
from diffusion_jax.models.conditions import Conditional, initial_inputs
from diffusion_jax.models.layers import times_of_rows


class Shapes(NamedTuple):
    """The shapes that a network's function gets.

    data: the shape of x_t, (*spatial, C). output: the shape of the output, with 2 C channels for a learned variance.
    num_labels: 0 without labels; otherwise y int [B] lies in 0 ... num_labels - 1, where the last label means "no class" if
    `model.label_dropout` is above 0. condition: the shape of a condition, (D,) or (*spatial, K); None without conditions.
    """

    data: tuple[int, ...]
    output: tuple[int, ...]
    num_labels: int = 0
    condition: tuple[int, ...] | None = None


class CustomNetwork(Conditional):
    """A network made by a user's function. `Conditional` handles labels, conditions and their dropout in training.

    `CustomNetwork(...).apply({"params": params}, x_t, time, y, train, condition, extra)` -> [B, *spatial, out_channels]
    float32. The null label is `num_classes`. The network's attribute `null_condition`, a number or an array that broadcasts
    to the condition, replaces dropped conditions; without this attribute, conditions cannot be dropped.

    kind: the name of the function, "module:function". function: makes the network, as this module's docstring describes.
    settings: settings of `config.model` that the function takes. options: other keyword arguments. Both are sorted pairs
    (name, value). out_channels: channels of the output; None for x_t's number of channels. dtype: "bfloat16" casts
    the parameters, x_t and the condition before each call; the output is cast to float32; the time and `extra` stay float32.
    """

    kind: str = ""
    function: Callable | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    out_channels: int | None = None
    dtype: str = "float32"
    precision: str = "default"
    remat: bool = False

    @nn.compact
    def __call__(self, x_t, time, y=None, train: bool = False, condition=None, extra=None) -> jax.Array:
        """x_t: [B, *spatial, C]; time, y, condition, train: as in `UNet`. extra: further numbers, [B, K] or None."""
        if not jnp.issubdtype(x_t.dtype, jnp.floating):
            raise ValueError(f"x_t must be float, got {x_t.dtype}")
        y, condition = self._prepare(y, condition, x_t, train)
        functions = self._make_functions(x_t, condition)
        if condition is not None and self.condition_dropout:
            if functions.null_condition is None:
                raise ValueError(
                    f"condition_dropout={self.condition_dropout} needs a condition that means none; give the network of "
                    f"{self.kind} the attribute null_condition, or use 0"
                )
            null = jnp.asarray(functions.null_condition, condition.dtype)
            condition = jnp.where(jnp.isnan(condition), null, condition)
        inputs = {
            "x_t": x_t,
            "time": times_of_rows(time, x_t),
            "y": y,
            "condition": condition,
            "extra": extra,
            "train": train,
        }
        params = self.param("network", lambda key: jax.tree.map(jnp.asarray, functions.init(key, inputs)))
        if self.dtype == "bfloat16":
            params = _cast(params, jnp.bfloat16)
            inputs |= {name: _cast(inputs[name], jnp.bfloat16) for name in ("x_t", "condition")}
        key = batch_key = self.make_rng("dropout") if train else None
        if train and self.has_rng("microbatch"):
            key = self.make_rng("microbatch")
        return jnp.asarray(functions.apply(params, inputs, key, batch_key)).astype(jnp.float32)

    @property
    def remat_choices(self) -> tuple[bool]:
        """Returns only the current value, because the layers are unknown."""
        return (self.remat,)

    def check_data(self, shape: tuple[int, ...]) -> None:
        """Traces the network to check the shape of its output and that the output depends on every input.

        shape: the shape of an example, (*spatial, C). Nothing is compiled.
        Raises: ValueError, one line, for an output with another shape; an input without effect; a dropout above 0 in a
          network that draws no random numbers; variables that a call changes, such as the averages of BatchNorm.
        """
        plain = self.clone(label_dropout=0.0, condition_dropout=0.0)  # only the user's network draws random numbers
        inputs: dict[str, Any] = {
            name: jnp.repeat(value, 2, axis=0) for name, value in initial_inputs(plain, shape).items()
        }
        params = jax.eval_shape(lambda: plain.init(jax.random.key(0), **inputs))["params"]

        def call(params, inputs, key):
            return plain.apply({"params": params}, **inputs, train=True, rngs={"dropout": key})

        traced, output = jax.make_jaxpr(call, return_shape=True)(params, inputs, jax.random.key(0))
        expected = (2, *shape[:-1], self.out_channels or shape[-1])
        if output.shape != expected:
            raise ValueError(
                f"{self.kind}: the output has shape {list(output.shape)} for x_t {[2, *shape]}, and must have "
                f"{list(expected)}"
            )
        _, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        used = used[len(jax.tree.leaves(params)) :]
        for name, is_used in zip(sorted(inputs), used, strict=False):
            if not is_used:
                raise ValueError(f"{self.kind}: the output does not depend on {name}; use {name} in the network's call")
        dropout = dict(self.settings).get("dropout", 0.0)
        if dropout > 0 and not used[-1]:
            raise ValueError(
                f"model.dropout={dropout} has no effect: {self.kind} draws no random numbers; use --config.model.dropout=0"
            )

    def _make_functions(self, x_t, condition) -> _Functions:
        """Returns the network as pure functions. Raises: ValueError if the user's function returns another type."""
        shapes = Shapes(
            x_t.shape[1:],
            (*x_t.shape[1:-1], self.out_channels or x_t.shape[-1]),
            self._num_labels if self.num_classes else 0,
            None if condition is None else condition.shape[1:],
        )
        assert self.function is not None
        make = functools.partial(self.function, shapes, **dict(self.settings + self.options))
        if "rngs" in inspect.signature(self.function).parameters:  # an NNX module draws its parameters when it is made
            return _nnx_functions(make)
        network = make()
        if isinstance(network, nn.Module):
            return _linen_functions(network.clone(parent=None))
        if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
            return _plain_functions(*network)
        if isinstance(network, nnx.Module):
            raise ValueError(f"{self.kind} returns an NNX module, which needs random keys; add an argument rngs")
        raise ValueError(
            f"{self.kind} must return a Linen module, an NNX module or a pair (init, apply), and not a "
            f"{type(network).__name__}"
        )


class _Functions(NamedTuple):
    """A network as pure functions: init(key, inputs) -> params, and apply(params, inputs, key, batch_key) -> output.

    key: the key for random numbers in a microbatch. batch_key: a key that all microbatches of a batch share, for Linen's
    dropout layers, whose masks `training.step.Microbatch` splits.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    null_condition: Any = None


def _linen_functions(module: nn.Module) -> _Functions:
    known = functools.partial(_known_arguments, type(module).__call__)

    def init(key, inputs):
        variables = dict(module.init(key, **known({**inputs, "train": False})))
        params = variables.pop("params", {})
        if variables:
            raise ValueError(_describe_mutable(f"collection {min(variables)!r}"))
        return params

    def apply(params, inputs, key, batch_key):
        rngs = {} if key is None else {"dropout": key, "batch_dropout": batch_key}
        return module.apply({"params": params}, **known(inputs), rngs=rngs)

    return _Functions(init, apply, getattr(module, "null_condition", None))


def _nnx_functions(make: Callable[..., nnx.Module]) -> _Functions:
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graph, params_state, rest = nnx.split(abstract, nnx.Param, ...)
    for path, value in nnx.to_flat_state(rest):
        if not isinstance(value, nnx.RngState):
            raise ValueError(_describe_mutable(f"variable {'.'.join(map(str, path))}"))

    def init(key, inputs):
        flat = flatten_dict(nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param)))
        return unflatten_dict({tuple(map(str, path)): value for path, value in flat.items()})  # lists have int keys

    def apply(params, inputs, key, _):
        key = jax.random.key(0) if key is None else key
        nnx.replace_by_pure_dict(params_state, params)
        leaves, structure = jax.tree.flatten(rest)
        random = [  # the module's streams of random numbers: their keys, and counts that start at 0
            jax.random.fold_in(key, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        module = nnx.merge(graph, params_state, jax.tree.unflatten(structure, random))
        module.set_attributes(deterministic=not inputs["train"], raise_if_not_found=False)
        return module(**_known_arguments(type(module).__call__, inputs))

    return _Functions(init, apply, getattr(abstract, "null_condition", None))


def _plain_functions(init: Callable, function: Callable) -> _Functions:
    """Wraps (init, apply), whose parameters may be any pytree, such as an Equinox module, to use nested dicts instead."""
    paths, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init, jax.random.key(0)))
    names = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ("value",) for path, _ in paths]

    def init_dicts(key, inputs):
        return unflatten_dict(dict(zip(names, jax.tree.leaves(init(key)), strict=True)))

    def apply(params, inputs, key, _):
        leaves = flatten_dict(params)
        tree = jax.tree.unflatten(structure, [leaves[name] for name in names])
        return function(tree, **_known_arguments(function, {**inputs, "key": key}))

    return _Functions(init_dicts, apply, getattr(function, "null_condition", None))


def _known_arguments(function: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs whose names are arguments of the function."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _cast(tree: Any, dtype: Any) -> Any:
    """Casts the float leaves of a tree."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf, tree
    )


def _describe_mutable(name: str) -> str:
    return (
        f"the network has the {name}, which a call changes, as BatchNorm does its averages; use GroupNorm or LayerNorm "
        "instead"
    )


# ---- Options


def read_options(
    kind: str, function: Callable, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (the settings of `config.model` that a function takes, its options with checked values).

    Raises: ValueError for an option that the function does not take, or whose value does not fit the type hint, and for a
      missing option without a default.
    """
    parameters = {
        name: each
        for name, each in list(inspect.signature(function).parameters.items())[1:]
        if name != "rngs" and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # names imported only for type checking, or a callable that is not a function
        hints = {}
    taken = {name: settings[name] for name in parameters if name in settings}
    known = {name: value for name, value in parameters.items() if name not in settings}
    if unknown := sorted(options.keys() - known.keys()):
        listed = f"its options: {', '.join(known) or 'none'}"
        raise ValueError(f"model.options.{unknown[0]} is not an argument of {kind}; {listed}")
    checked = {}
    for name, value in options.items():
        if (allowed := _value_kind(hints.get(name))) is None:
            checked[name] = value
            continue
        try:
            checked[name] = allowed.check(value)
        except ValueError as error:
            advice = f"; {error}" if str(error) else ""
            raise ValueError(f"model.options.{name}={value!r} must be {allowed.allowed}{advice}") from None
    missing = [name for name, value in known.items() if value.default is value.empty and name not in options]
    if missing:
        raise ValueError(f"{kind} needs model.options.{missing[0]}; give --config.model.options.{missing[0]}=VALUE")
    return taken, checked


def _value_kind(hint: Any) -> Any:
    """Returns the kind of values that a type hint allows; None if it allows any value."""
    scalar = {int: Integer(), float: Number(), bool: Boolean(), str: Text()}
    if hint in scalar:
        return scalar[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return Choice(*arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [_value_kind(each) for each in arguments if each is not type(None)]
        if None in kinds:
            return None
        return optional(OneOf(*kinds)) if type(None) in arguments else OneOf(*kinds)
    is_uniform = len(set(arguments) - {Ellipsis}) == 1
    if origin in (tuple, list) and is_uniform and (item := _value_kind(arguments[0])) is not None:
        return Tuple(item, "values")
    return None
