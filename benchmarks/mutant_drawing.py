"""Draws mutants of a package: single-line changes by the operators of cosmic-ray."""

from __future__ import annotations

import ast
import difflib
import hashlib
import pathlib
import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

PACKAGE = "diffusion_jax"


class Mutant(NamedTuple):
    """One change of one file, by its path in the package. name: the operator, and its occurrence in the file."""

    file: str
    name: str
    source: str
    diff: str


def annotation_ranges(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(begin, end) of every type annotation, as (line, column). They are never evaluated, so no test can detect a change."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if inner is not None:
                ranges.append(((inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)))
    return ranges


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """{position: [(operator, its occurrence in the file)]} of cosmic-ray's mutations of a source.

    Annotations are left out, and so are replacements of arithmetic operators by bit operators and the reverse (type errors).
    """
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    skipped, found = annotation_ranges(source), {}
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


def draw(files: Iterable[str], count: int, seed: int, root: pathlib.Path) -> tuple[list[Mutant], int]:
    """(`count` mutants at different places of the files or as many as there are, the number of places).

    Every place is equally likely. Its rank depends only on the seed, the file and the text of its line, so a larger count
    starts with the same mutants, and versions of a file have the mutants of equal lines in common.
    """
    ranked = []
    for file in files:
        source, repeated = (root / PACKAGE / file).read_text(), Counter()
        for position, choices in sorted(places(source).items()):
            line = source.splitlines()[position[0] - 1].strip()
            repeated[line] += 1
            name = f"{seed} {file} {line} {repeated[line]}"
            ranked.append((hashlib.sha256(name.encode()).hexdigest(), file, choices))
    mutants = []
    for rank, file, choices in sorted(ranked):
        if len(mutants) == count:
            break
        mutant = _mutate(file, (root / PACKAGE / file).read_text(), *random.Random(rank).choice(choices))
        mutants += [mutant] if mutant else []
    return mutants, len(ranked)


def _mutate(file: str, source: str, operator: str, occurrence: int) -> Mutant | None:
    """The mutant of one operator at one of its places; None if its source is invalid or means the same."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    mutated = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    try:
        if mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    path = f"{PACKAGE}/{file}"
    lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), f"a/{path}", f"b/{path}", "", "", 1, "")
    return Mutant(file, f"{operator.rpartition('/')[2]} {occurrence}", mutated, "\n".join(lines))
