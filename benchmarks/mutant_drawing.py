"""Draws mutants of a package: single-line changes by cosmic-ray's operators."""

from __future__ import annotations

import ast
import difflib
import hashlib
import pathlib
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

PACKAGE = "diffusion_jax"


class Mutant(NamedTuple):
    """A change in one file. file: path in the package. name: the operator, and the operator's occurrence in the file."""

    file: str
    name: str
    source: str
    diff: str


def annotation_ranges(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns (begin, end) of every type annotation, as (line, column). No test detects changes in annotations."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if inner is not None:
                ranges.append(((inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)))
    return ranges


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Returns cosmic-ray's mutations of a source: {position: [(operator, occurrence in the file)]}.

    Annotations are left out, and also replacements between arithmetic operators and bit operators (type errors).
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
    """Returns whether a mutation replaces an arithmetic operator by a bit operator, or the reverse."""
    words = name.removeprefix("ReplaceBinaryOperator_").split("_")
    bits = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
    return len(words) == 2 and (words[0] in bits) != (words[1] in bits)


def added_lines(root: pathlib.Path, commit: str, file: str) -> set[int]:
    """Returns the numbers of the lines that were added to a file since a commit, or changed."""
    command = ["git", "diff", "--unified=0", commit, "--", f"{PACKAGE}/{file}"]
    diff = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    hunks = re.findall(r"^@@ .* \+(\d+)(?:,(\d+))? @@", diff, re.MULTILINE)
    return {int(first) + i for first, count in hunks for i in range(int(count or 1))}


def draw(
    files: Iterable[str], count: int, seed: int, root: pathlib.Path, since: str | None = None
) -> tuple[list[Mutant], int]:
    """Returns (at most `count` mutants at different places in the files, number of places).

    since: a commit; only lines that were added or changed since this commit are mutated.
    Every place is equally likely. A place's rank depends only on the seed, the file and the line's text, so a larger count
    starts with the same mutants, and equal lines have the same mutants in all versions of a file.
    """
    ranked = []
    for file in files:
        source, repeated = (root / PACKAGE / file).read_text(), Counter()
        allowed = added_lines(root, since, file) if since else None
        for position, choices in sorted(places(source).items()):
            line = source.splitlines()[position[0] - 1].strip()
            repeated[line] += 1
            name = f"{seed} {file} {line} {repeated[line]}"
            if allowed is not None and position[0] not in allowed:
                continue
            ranked.append((hashlib.sha256(name.encode()).hexdigest(), file, choices))
    mutants = []
    for rank, file, choices in sorted(ranked):
        if len(mutants) == count:
            break
        mutant = _mutate(file, (root / PACKAGE / file).read_text(), *random.Random(rank).choice(choices))
        mutants += [mutant] if mutant else []
    return mutants, len(ranked)


def _mutate(file: str, source: str, operator: str, occurrence: int) -> Mutant | None:
    """Returns the mutant of an operator at one place; None if the source becomes invalid or means the same."""
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
