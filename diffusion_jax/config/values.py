"""The kinds of values that settings allow, and `parse`, which reads command-line text without evaluating it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from diffusion_jax.errors import closest_names

_LARGEST = 2**31 - 1


class ValueKind(Protocol):
    """The values that a setting allows. allowed: a noun phrase that follows "must be" in errors."""

    @property
    def allowed(self) -> str: ...

    def check(self, value: Any) -> Any:
        """Converts the value to its Python type. Raises: ValueError if not allowed, with advice or "" as message."""
        ...


def parse(kind: ValueKind, text: str) -> Any:
    """Returns a command-line text's first possible value that `kind` allows. Raises: ValueError, as `ValueKind.check`."""
    return _first_allowed([partial(kind.check, value) for value in _readings(text.strip())])


def _readings(text: str) -> Iterator[Any]:
    """Yields a text's possible values: None, a number, a bool, a tuple in brackets, a string, a tuple without brackets."""
    if text == "None":
        yield None
    if not isinstance(number := _to_item(text), str):
        yield number
    if text.lower() in ("true", "1", "false", "0"):
        yield text.lower() in ("true", "1")
    is_tuple = text[:1] + text[-1:] in ("()", "[]")
    items = re.findall(r"\s*'[^']*'|\s*\"[^\"]*\"|[^,]+", text[1:-1] if is_tuple else text)  # "(1, 2)", "['a, b', c]"
    values = tuple(_to_item(item.strip()) for item in items if item.strip())
    yield from [values, _unquote(text)] if is_tuple else [_unquote(text), values]


def _to_item(text: str) -> int | float | str:
    """Reads a number, such as 10000, 1e4 or 0.5; returns any other text without quotes."""
    try:
        number = float(text)
    except ValueError:
        return _unquote(text)
    return int(number) if number.is_integer() else number


def _first_allowed(checks: Sequence[Callable[[], Any]]) -> Any:
    """Returns the result of the first check that allows its value. Raises: ValueError with the first advice if none does."""
    advice = []
    for check in checks:
        try:
            return check()
        except ValueError as error:
            advice.append(str(error))
    raise ValueError(next(filter(None, advice), ""))


def _to_scalar(value: Any) -> Any:
    """Converts a NumPy or JAX array without dimensions to its Python value; anything else is unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _unquote(text: str) -> str:
    """Removes one pair of quotes around the text."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


class Text:
    """A string, or an os.PathLike."""

    allowed = "a string"

    def check(self, value: Any) -> str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, str):
            raise ValueError
        return str(value)  # a str, not a subclass such as NumPy's


class Choice:
    """One of several names, numbers or None. jnp.bfloat16 and other types are allowed instead of their names."""

    def __init__(self, *choices: str | int | None):
        self.choices = choices

    @property
    def allowed(self) -> str:
        *names, last = map(str, self.choices)
        return f"{', '.join(names)} or {last}" if names else last

    def check(self, value: Any) -> Any:
        value = np.dtype(value).name if isinstance(value, type | np.dtype) else _to_scalar(value)
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:  # True is not 1
                return choice
        near = closest_names(value, list(map(str, self.choices))) if isinstance(value, str) else []
        raise ValueError(f"did you mean {near[0]}?" if near else "")


Boolean = partial(Choice, True, False)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number. minimum, maximum: included; above, below: excluded; None for no bound. whole: an int, otherwise a float.

    A whole number without a maximum must fit into 32 bits, like the numbers of training steps and timesteps.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    finite: bool = True

    @property
    def allowed(self) -> str:
        noun = "a whole number" if self.whole else "a number"
        if self.maximum is not None or self.below is not None:
            low = f"[{self.minimum}" if self.above is None else f"({self.above}"
            return f"{noun} in {low}, " + (f"{self.maximum}]" if self.below is None else f"{self.below})")
        if self.above is not None:
            return f"{noun} above {self.above}"
        return noun if self.minimum is None else f"{noun} of at least {self.minimum}"

    def check(self, value: Any) -> float:
        value = _to_scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        number = float(value)
        if self.whole and self.maximum is None and _LARGEST < number < math.inf:
            raise ValueError(f"the largest whole number is {_LARGEST}")
        if self.whole:
            if not isinstance(value, numbers.Integral):
                raise ValueError(f"write {int(number)}" if number.is_integer() else "")
            number = int(value)
        inside = (
            (math.isfinite(number) or not self.finite)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise ValueError
        return number


Integer = partial(Number, whole=True)


@dataclasses.dataclass(frozen=True)
class Tuple:
    """A tuple, or another sequence, whose items have one kind.

    items: a plural noun for the items. shown: an example. rising: whether the tuple must be empty or have at least two items
    in increasing order.
    """

    item: ValueKind
    items: str
    minimum_length: int = 0
    maximum_length: int | None = None
    shown: str = ""
    rising: bool = False

    @property
    def allowed(self) -> str:
        return f"a tuple of {self.items}" + (f" such as {self.shown}" if self.shown else "")

    def check(self, value: Any) -> tuple:
        if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
            raise ValueError
        values = []
        for item in value:
            try:
                values.append(self.item.check(item))
            except ValueError as error:
                raise ValueError(f"{item!r} is not allowed" + (f"; {error}" if str(error) else "")) from None
        is_rising = not self.rising or (
            len(values) != 1 and all(low < high for low, high in itertools.pairwise(values))
        )
        if not (is_rising and self.minimum_length <= len(values) <= (self.maximum_length or math.inf)):
            raise ValueError
        return tuple(values)


Interval = partial(Tuple, maximum_length=2, rising=True)  # (low, high), or ()


class OneOf:
    """A value of one of several kinds; the first kind that allows the value converts it."""

    def __init__(self, *kinds: ValueKind):
        self.kinds = kinds

    @property
    def allowed(self) -> str:
        return " or ".join(kind.allowed for kind in self.kinds)

    def check(self, value: Any) -> Any:
        return _first_allowed([partial(kind.check, value) for kind in self.kinds])


def optional(kind: ValueKind) -> OneOf:
    """Allows a kind, or None."""
    return OneOf(kind, Choice(None))


FUNCTION_NAME = re.compile(r"[^:]+(:[^:]*)?\.py:\w+|[\w.]+:\w+")


class FunctionName:
    """The name of a function, "module:function" or "FILE.py:function", which `import_function` imports.

    The path of an existing file becomes absolute, so that the name has the same meaning in every directory.
    """

    allowed = "module:function, or FILE.py:function"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not FUNCTION_NAME.fullmatch(value):
            raise ValueError
        file, _, function = value.rpartition(":")
        return f"{os.path.abspath(file)}:{function}" if file.endswith(".py") and os.path.isfile(file) else str(value)


class Topology:
    """A TPU topology: a chip, and the shape of a slice."""

    allowed = "a TPU topology such as v5e:4x4"

    def check(self, value: Any) -> str:
        # Configs of 0.3 may have v4 or v5e without a shape, which `--mode=plan` refuses.
        if not isinstance(value, str) or not re.fullmatch(r"v\d\w?:\d+(x\d+){1,2}|v4|v5e", value):
            raise ValueError
        return value


class NamedValues:
    """Values by name, for the keyword arguments of a function: numbers, texts, bools, None, or tuples of these."""

    allowed = "values by name"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        if wrong := [name for name in value if not str(name).isidentifier()]:
            raise ValueError(f"{wrong[0]} is not the name of an argument")
        return {str(name): self._convert_value(name, each) for name, each in value.items()}

    def _convert_value(self, name: Any, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(self._convert_value(name, each) for each in value)
        value = _to_scalar(value)
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise ValueError(f"{name} is a {type(value).__name__}; give a number, text, bool, None or a tuple of these")
        return value


def read_value(text: str) -> Any:
    """Returns the first possible value of a command-line text, for `model.options`, whose kinds of values are unknown."""
    text = text.strip()
    return text == "True" if text in ("True", "False") else next(_readings(text))
