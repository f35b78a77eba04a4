"""Draws mutants of a source file: single-line changes by the operators of cosmic-ray."""

from __future__ import annotations

import ast
import difflib
import pathlib
import random
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "diffusion_jax"


class Mutant(NamedTuple):
    """One change of one file. name: unique and stable while the file stays as it is."""

    file: str
    name: str
    source: str
    diff: str


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(begin, end) of every type annotation, as (line, column). They are never evaluated, so no test can detect a change."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        of_class = isinstance(node, ast.ClassDef)
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if inner is not None and not of_class:
                ranges.append(((inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)))
    return ranges


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """{position: [(operator, its occurrence in the file)]} of cosmic-ray's mutations of a source.

    Annotations are left out, and so are replacements of arithmetic operators by bit operators and the reverse (type errors).
    """
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    skipped, found = annotations(source), {}
    nodes = list(ast_nodes(get_ast(source)))
    for operator in plugins.operator_names():
        kind = plugins.get_operator(operator)
        if kind.arguments() or _changes_kind(operator.rpartition("/")[2]):
            continue
        begins = (begin for node in nodes for begin, _ in kind().mutation_positions(node))
        for occurrence, begin in enumerate(begins):
            if not any(first <= begin < last for first, last in skipped):
                found.setdefault(begin, []).append((operator, occurrence))
    return found


def _changes_kind(name: str) -> bool:
    """Whether a mutation replaces an arithmetic operator by a bit operator, or the reverse."""
    words = name.removeprefix("ReplaceBinaryOperator_").split("_")
    bits = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
    return len(words) == 2 and (words[0] in bits) != (words[1] in bits)


def draw(file: str, count: int, seed: int, root: pathlib.Path = ROOT) -> list[Mutant]:
    """`count` mutants of a file at different places, or as many as it has. A larger count starts with the same mutants."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    path = f"{PACKAGE}/{file}.py"
    source = (root / path).read_text()
    rng, found = random.Random(f"{seed} {file}"), places(source)
    order, mutants = sorted(found), []
    rng.shuffle(order)
    for position in order:
        operator, occurrence = rng.choice(found[position])
        if len(mutants) == count:
            break
        mutated = mutate_code(source, plugins.get_operator(operator)(), occurrence)
        try:
            unchanged = mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if unchanged:
            continue
        lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), f"a/{path}", f"b/{path}", "", "", 1, "")
        mutants.append(Mutant(file, f"{operator.rpartition('/')[2]} {occurrence}", mutated, "\n".join(lines)))
    return mutants
