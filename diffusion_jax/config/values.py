"""The kinds of values that a leaf allows, as Python values and as text of a command line, which is never evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from diffusion_jax.errors import closest_names

__all__ = [
    "Boolean",
    "Choice",
    "Integer",
    "Interval",
    "Nothing",
    "Number",
    "OneOf",
    "Text",
    "Tuple",
    "ValueKind",
    "optional",
]


class ValueKind(Protocol):
    """The values that a leaf allows. allowed: a noun phrase that continues "must be"."""

    @property
    def allowed(self) -> str: ...

    def check(self, value: Any) -> Any:
        """The value in its own Python type. Raises: ValueError if it is not allowed; its text is advice, or empty."""
        ...

    def parse(self, text: str) -> Any:
        """The value of an argument on the command line. Raises: as `check`."""
        ...


def _to_scalar(value: Any) -> Any:
    """A NumPy or JAX array without dimensions as the Python value that it holds; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _to_number(value: Any, kind: type) -> Any:
    """A number of an abstract kind of `numbers`, but no bool. Raises: ValueError."""
    value = _to_scalar(value)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError
    return value


def _to_items(value: Any) -> tuple:
    """The items of a tuple, a list, another sequence or a one-dimensional array. Raises: ValueError."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return tuple(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return tuple(value)
    raise ValueError


def _split(text: str) -> list[str]:
    """The items of "1,2", "(1, 2)" or "['a, b', c]", with their quotes."""
    text = text.strip()
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    return [item for part in re.findall(r"\s*'[^']*'|\s*\"[^\"]*\"|[^,]+", inner) if (item := part.strip())]


def _unquote(text: str) -> str:
    """The text without one pair of quotes around it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Only None."""

    allowed: str = "None"

    def check(self, value: Any) -> None:
        if value is not None:
            raise ValueError

    def parse(self, text: str) -> None:
        if text != "None":
            raise ValueError


@dataclasses.dataclass(frozen=True)
class Boolean:
    """True or False."""

    allowed: str = "True or False"

    def check(self, value: Any) -> bool:
        value = _to_scalar(value)
        if not isinstance(value, bool):
            raise ValueError
        return value

    def parse(self, text: str) -> bool:
        value = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(text.lower())
        return self.check(value)


@dataclasses.dataclass(frozen=True)
class Text:
    """A string, or an os.PathLike. Quotes around it, which mark a string that looks like a number, are removed."""

    allowed: str = "a string"

    def check(self, value: Any) -> str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, str):
            raise ValueError
        return str(value)  # not a subclass, such as NumPy's

    def parse(self, text: str) -> str:
        return _unquote(text)


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number between two bounds, both included; None for no bound."""

    minimum: int | None = None
    maximum: int | None = None

    @property
    def allowed(self) -> str:
        if self.minimum is not None and self.minimum == self.maximum:
            return str(self.minimum)
        if self.minimum is not None and self.maximum is not None:
            return f"a whole number in {self.minimum} ... {self.maximum}"
        return "a whole number" + ("" if self.minimum is None else f" of at least {self.minimum}")

    def check(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            raise ValueError(f"write {int(value)}")
        number = int(_to_number(value, numbers.Integral))
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            raise ValueError
        return number

    def parse(self, text: str) -> int:
        with contextlib.suppress(ValueError):
            return self.check(int(text))
        try:
            value = float(text)
        except ValueError:
            raise ValueError("write it as 10000 or 1e4") from None
        if not (value.is_integer() and abs(value) <= 2**53):  # a larger float can be another number than the text
            raise ValueError
        return self.check(int(value))


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite float. minimum, maximum: included; above, below: excluded; None for no bound."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def allowed(self) -> str:
        has_low = self.minimum is not None or self.above is not None
        has_high = self.maximum is not None or self.below is not None
        if has_low and has_high:
            low = f"({self.above:g}" if self.above is not None else f"[{self.minimum:g}"
            high = f"{self.below:g})" if self.below is not None else f"{self.maximum:g}]"
            return f"a number in {low}, {high}"
        if self.above is not None:
            return f"a number above {self.above:g}"
        return "a finite number" if self.minimum is None else f"a number of at least {self.minimum:g}"

    def check(self, value: Any) -> float:
        number = float(_to_number(value, numbers.Real))
        inside = math.isfinite(number) and (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise ValueError
        return number

    def parse(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("write it as 0.5 or 2e-4") from None
        return self.check(value)


class Choice:
    """One of some names (or numbers). The name of a type may also be given as the type, such as jnp.bfloat16."""

    def __init__(self, *choices: str | int):
        self.choices = choices

    @property
    def allowed(self) -> str:
        names = list(map(str, self.choices))
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

    def check(self, value: Any) -> Any:
        value = np.dtype(value).name if isinstance(value, type | np.dtype) else _to_scalar(value)
        if isinstance(value, str | int) and not isinstance(value, bool) and value in self.choices:
            return self.choices[self.choices.index(value)]
        near = closest_names(value, list(map(str, self.choices))) if isinstance(value, str) else []
        raise ValueError(f"did you mean {near[0]}?" if near else "")

    def parse(self, text: str) -> Any:
        return self.check({str(choice): choice for choice in self.choices}.get(_unquote(text), _unquote(text)))


@dataclasses.dataclass(frozen=True)
class Tuple:
    """A tuple (or another sequence) of items of one kind.

    items: a plural noun for the items. shown: an example of a tuple. brackets: whether a command line must put the items into
    brackets, because without them the text is something else.
    """

    item: ValueKind
    items: str
    minimum_length: int = 0
    maximum_length: int | None = None
    shown: str = ""
    brackets: bool = False

    @property
    def allowed(self) -> str:
        return f"a tuple of {self.items}" + (f" such as {self.shown}" if self.shown else "")

    def check(self, value: Any) -> tuple:
        return self._convert(_to_items(value), self.item.check)

    def parse(self, text: str) -> tuple:
        if self.brackets and text[:1] not in ("(", "["):
            raise ValueError
        return self._convert(_split(text), self.item.parse)

    def _convert(self, items: Sequence, convert) -> tuple:
        values = []
        for item in items:
            try:
                values.append(convert(item))
            except ValueError as error:
                shown = item if isinstance(item, str) and item[:1] in ("'", '"') else repr(item)
                raise ValueError(f"{shown} is not allowed" + (f"; {error}" if str(error) else "")) from None
        if len(values) < self.minimum_length or (self.maximum_length is not None and len(values) > self.maximum_length):
            raise ValueError
        return tuple(values)


@dataclasses.dataclass(frozen=True)
class Interval:
    """() or (low, high) with low <= high; high may be infinite. finite: both are finite, and low < high."""

    unit: str
    finite: bool = False

    @property
    def allowed(self) -> str:
        return f"two numbers (low, high), or () for {self.unit}"

    def check(self, value: Any) -> tuple[float, ...]:
        bounds = tuple(float(_to_number(bound, numbers.Real)) for bound in _to_items(value))
        if len(bounds) not in (0, 2) or (bounds and not bounds[0] <= bounds[1]):
            raise ValueError
        if self.finite and bounds and not (bounds[0] < bounds[1] and all(map(math.isfinite, bounds))):
            raise ValueError
        return bounds

    def parse(self, text: str) -> tuple[float, ...]:
        try:
            bounds = tuple(map(float, _split(text)))
        except ValueError:
            raise ValueError("write it as 0,100") from None
        return self.check(bounds)


class OneOf:
    """The first of several kinds that allows a value."""

    def __init__(self, *kinds: ValueKind):
        self.kinds = kinds

    @property
    def allowed(self) -> str:
        return " or ".join(kind.allowed for kind in self.kinds)

    def check(self, value: Any) -> Any:
        return self._first(value, [kind.check for kind in self.kinds])

    def parse(self, text: str) -> Any:
        return self._first(text, [kind.parse for kind in self.kinds])

    def _first(self, value: Any, conversions: Sequence) -> Any:
        advice = []
        for convert in conversions:
            try:
                return convert(value)
            except ValueError as error:
                advice.append(str(error))
        raise ValueError(next(filter(None, advice), ""))


def optional(kind: ValueKind) -> OneOf:
    """A kind, or None."""
    return OneOf(kind, Nothing())
