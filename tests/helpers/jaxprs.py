"""The operations of a traced program."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """Every equation in a jaxpr, including nested programs."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(equation.params):
            if hasattr(part, "eqns"):
                yield from equations(part)


def calls(jaxpr, name: str) -> list:
    """The equations that call a jitted function with this name."""
    return [e for e in equations(jaxpr) if e.primitive.name in ("jit", "pjit") and e.params["name"] == name]


def loops(jaxpr) -> list:
    """All loops, outermost and nested."""
    return [e for e in equations(jaxpr) if e.primitive.name in ("scan", "while")]
