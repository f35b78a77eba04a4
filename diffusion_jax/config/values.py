"""The kinds of values of a leaf: which values are allowed, and how text from a command line is parsed."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
from typing import Any, Protocol

import numpy as np

from diffusion_jax.config.conversion import to_float, to_integer, to_items, to_scalar
from diffusion_jax.errors import closest_names

__all__ = [
    "Boolean",
    "Choice",
    "ChoiceOrNone",
    "DType",
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
    """The values that a leaf allows.

    allowed: a noun phrase that continues "must be".
    example: shown if text from a command line cannot be parsed; "" for none.
    """

    @property
    def allowed(self) -> str: ...

    @property
    def example(self) -> str: ...

    def check(self, value: Any) -> Any:
        """The value in its own Python type. Raises: ValueError if it is not allowed."""
        ...

    def parse(self, text: str) -> Any:
        """The value of an argument on the command line. Raises: ValueError."""
        ...

    def hint(self, value: Any) -> str:
        """Advice for a value that is not allowed, such as the value to type instead; "" for none."""
        ...


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Only None."""

    allowed: str = "None"
    example: str = ""

    def check(self, value: Any) -> None:
        if value is not None:
            raise ValueError

    def parse(self, text: str) -> None:
        if text != "None":
            raise ValueError

    def hint(self, value: Any) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Boolean:
    """True or False."""

    allowed: str = "True or False"
    example: str = ""

    def check(self, value: Any) -> bool:
        value = to_scalar(value)
        if not isinstance(value, bool):
            raise ValueError
        return value

    def parse(self, text: str) -> bool:
        try:
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        except KeyError:
            raise ValueError from None

    def hint(self, value: Any) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A string.

    quotes: whether the command line may put quotes around it, to mark a string that looks like a number.
    path: whether it is a path, which may also be given as an os.PathLike.
    """

    quotes: bool = False
    path: bool = False
    allowed: str = "a string"
    example: str = ""

    def check(self, value: Any) -> str:
        value = os.fspath(value) if self.path and isinstance(value, os.PathLike) else value
        if not isinstance(value, str):
            raise ValueError
        return str(value)  # not a subclass, such as NumPy's

    def parse(self, text: str) -> str:
        if self.quotes and text[:1] in ("'", '"'):
            return self.check(_literal(text))
        return text

    def hint(self, value: Any) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number between two bounds, both included; None for no bound."""

    minimum: int | None = None
    maximum: int | None = None
    example: str = "such as 10000 or 1e4"

    @property
    def allowed(self) -> str:
        if self.minimum is not None and self.minimum == self.maximum:
            return str(self.minimum)
        if self.minimum is not None and self.maximum is not None:
            return f"a whole number in {self.minimum} ... {self.maximum}"
        return "a whole number" + ("" if self.minimum is None else f" of at least {self.minimum}")

    def check(self, value: Any) -> int:
        number = to_integer(value)
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            raise ValueError
        return number

    def parse(self, text: str) -> int:
        try:
            return int(text)
        except ValueError:
            value = float(text)
        if not math.isfinite(value) or int(value) != value or abs(value) > 2**53:
            raise ValueError  # beyond 2^53 a float can be another whole number than the text
        return int(value)

    def hint(self, value: Any) -> str:
        return _integer_hint(value)


def _integer_hint(value: Any) -> str:
    return f"write {int(value)}" if isinstance(value, float) and value.is_integer() else ""


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite float. minimum, maximum: included; above, below: excluded; None for no bound."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    example: str = "such as 0.5 or 2e-4"

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
        number = to_float(value)
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
        return float(text)

    def hint(self, value: Any) -> str:
        return ""


class Choice:
    """One of some names (or numbers)."""

    example = ""

    def __init__(self, *choices: str | int):
        self.choices = choices

    @property
    def allowed(self) -> str:
        names = list(map(str, self.choices))
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

    def check(self, value: Any) -> Any:
        value = value if isinstance(value, str) else to_integer(value)
        if value not in self.choices:
            raise ValueError
        return self.choices[self.choices.index(value)]

    def parse(self, text: str) -> Any:
        for choice in self.choices:
            if text == str(choice):
                return choice
        return text  # `check` refuses it

    def hint(self, value: Any) -> str:
        names = [choice for choice in self.choices if isinstance(choice, str)]
        near = closest_names(value, names) if isinstance(value, str) else []
        return f"did you mean {near[0]}?" if near else "" if names else _integer_hint(value)


class ChoiceOrNone(Choice):
    """One of some names; None stands for the name "none"."""

    def check(self, value: Any) -> Any:
        return super().check("none" if value is None else value)


class DType(Choice):
    """The name of a floating type, or the type itself, such as jnp.bfloat16 or np.dtype("float32")."""

    def check(self, value: Any) -> Any:
        return super().check(np.dtype(value).name if isinstance(value, type | np.dtype) else value)

    def hint(self, value: Any) -> str:
        name = value if isinstance(value, str) else np.dtype(value).name if isinstance(value, type | np.dtype) else ""
        if name == "float16":
            return "gradients underflow without loss scaling, so use bfloat16"
        return super().hint(value)


@dataclasses.dataclass(frozen=True)
class Tuple:
    """A tuple (or another sequence) of items of one kind.

    items: a plural noun for the items. shown: an example of a tuple.
    bare: whether the command line may give one item alone, and several names without quotes: `fid,kid`.
    """

    item: ValueKind
    items: str
    length: int | None = None
    minimum_length: int = 0
    maximum_length: int | None = None
    shown: str = ""
    bare: bool = False

    @property
    def allowed(self) -> str:
        count = "" if self.length is None else f"{self.length} "
        return f"a tuple of {count}{self.items}" + (f" such as {self.shown}" if self.shown else "")

    @property
    def example(self) -> str:
        return ""

    def check(self, value: Any) -> tuple:
        items = to_items(value)
        longest = len(items) if self.maximum_length is None else self.maximum_length
        if not self.minimum_length <= len(items) <= longest or self.length not in (None, len(items)):
            raise ValueError
        return tuple(self.item.check(item) for item in items)

    def parse(self, text: str) -> tuple:
        if self.bare and isinstance(self.item, Choice) and not set(text) & set("()[]'\""):
            return tuple(self.item.parse(name.strip()) for name in text.split(",") if name.strip())
        value = _literal(text)
        if isinstance(value, tuple | list):
            return tuple(value)  # `check` refuses items, with a hint
        if not self.bare:
            raise ValueError
        return (value,)

    def hint(self, value: Any) -> str:
        try:
            items = self.parse(value) if self.bare and isinstance(value, str) else to_items(value)
        except ValueError:
            return ""
        for item in items:
            try:
                self.item.check(item)
            except ValueError:
                advice = self.item.hint(item)
                return f"{item!r} is not allowed" + (f"; {advice}" if advice else "")
        return ""


@dataclasses.dataclass(frozen=True)
class Interval:
    """() or (low, high) with low <= high; high may be infinite. finite: both are finite, and low < high."""

    unit: str
    finite: bool = False
    example: str = ""

    @property
    def allowed(self) -> str:
        return f"two numbers (low, high), or () for {self.unit}"

    def check(self, value: Any) -> tuple[float, ...]:
        bounds = tuple(to_float(bound) for bound in to_items(value))
        if len(bounds) not in (0, 2) or (bounds and not bounds[0] <= bounds[1]):
            raise ValueError
        if self.finite and bounds and not (bounds[0] < bounds[1] and all(map(math.isfinite, bounds))):
            raise ValueError
        return bounds

    def parse(self, text: str) -> tuple[float, ...]:
        return self.check(_literal(text))

    def hint(self, value: Any) -> str:
        return ""


class OneOf:
    """The first of several kinds that allows a value."""

    def __init__(self, *kinds: ValueKind):
        self.kinds = kinds

    @property
    def allowed(self) -> str:
        return " or ".join(kind.allowed for kind in self.kinds)

    @property
    def example(self) -> str:
        return ""

    def check(self, value: Any) -> Any:
        for kind in self.kinds:
            try:
                return kind.check(value)
            except ValueError:
                continue
        raise ValueError

    def parse(self, text: str) -> Any:
        for kind in self.kinds:
            try:
                return kind.check(kind.parse(text))
            except ValueError:
                continue
        raise ValueError

    def hint(self, value: Any) -> str:
        return next(filter(None, (kind.hint(value) for kind in self.kinds)), "")


def optional(kind: ValueKind) -> OneOf:
    """A kind, or None."""
    return OneOf(kind, Nothing())


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError from None
