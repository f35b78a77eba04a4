"""The operations of a traced program."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(equation.params):
            if hasattr(part, "eqns"):
                yield from equations(part)


def calls(jaxpr, name: str) -> list:
    """The equations that call a jitted function of that name."""
    return [e for e in equations(jaxpr) if e.primitive.name in ("jit", "pjit") and e.params["name"] == name]


def loops(jaxpr) -> list:
    """The loops, outermost and inner ones."""
    return [e for e in equations(jaxpr) if e.primitive.name in ("scan", "while")]
