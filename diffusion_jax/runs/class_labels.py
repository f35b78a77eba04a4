"""The classes of samples: `sampling.class`, labels of sample numbers, and their captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from diffusion_jax.errors import UserError, closest_names, list_names

__all__ = ["ClassLabels", "class_captions", "parse_classes"]


def class_captions(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Each label with its name, as "class 1: cats"; only the number if it has no other name."""
    known = [names[y] if y < len(names) else "" for y in labels.tolist()]
    pairs = zip(labels.tolist(), known, strict=True)
    return [f"class {y}" if name in ("", str(y)) else f"class {y}: {name}" for y, name in pairs]


class ClassLabels:
    """The label of each sample: sample i has the class number i modulo the number of classes.

    classes: None if samples have no class. names: of all classes of the model, () if they are not known.
    """

    def __init__(self, classes: tuple[int, ...] | None, names: Sequence[str] = ()):
        self.classes, self.names = classes, tuple(names)
        self.given: np.ndarray | None = None

    def set_given(self, labels: np.ndarray) -> None:
        """Replaces the classes in turn by the labels [N] of given small images, in turn. Raises: UserError."""
        assert self.classes is not None
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(self.classes):
            raise UserError(f"the small images' labels (arr_1) must be classes in 0 ... {len(self.classes) - 1}")
        self.given = labels.astype(np.int32)

    def __call__(self, indices: np.ndarray) -> np.ndarray | None:
        """int32 labels of the samples of these numbers; None if they have none."""
        if self.given is not None:
            return self.given[indices % len(self.given)]
        return None if self.classes is None else np.array(self.classes, np.int32)[indices % len(self.classes)]

    def captions(self, indices: np.ndarray) -> list[str] | None:
        """Class and name, as "1: cats", of the samples of these numbers; None if they have no class."""
        labels = self(indices)
        return None if labels is None else class_captions(labels, self.names)

    def name_in_files(self) -> tuple[str, bool]:
        """The classes as a part of a file name, and whether a digest must replace the list because it is too long."""
        assert self.classes is not None
        names = [self._class_in_files(y) for y in self.classes]
        # A class's own name may contain a "-".
        name = "class" + ("-" if all(map(str.isdecimal, names)) else "+").join(names)
        return (name, False) if len(name) <= 40 else (f"{len(self.classes)}classes", True)

    def _class_in_files(self, y: int) -> str:
        """The name of a class if it is short, plain and unique, otherwise its number."""
        name = self.names[y] if y < len(self.names) else ""
        is_plain = re.fullmatch("[A-Za-z0-9_-]{1,20}", name) and re.search("[A-Za-z]", name)
        is_unique = [other.lower() for other in self.names].count(name.lower()) == 1
        return name if is_plain and is_unique else str(y)


def parse_classes(value, num_classes: int, names: Sequence[str]) -> tuple[int, ...] | None:
    """The classes of `sampling.class`: all classes for None; None for a model without classes. Raises: UserError.

    value: a class or several, each an index or a name; a string may list several, as in "3,cats".
    """
    if value is None:
        return tuple(range(num_classes)) or None
    if not num_classes:
        raise UserError(f"sampling.class={value}, but the model has no classes (model.num_classes=0)")
    classes = value
    if isinstance(value, str) and value not in names:
        classes = [part.strip(" '\"") for part in value.strip("()[] ,").split(",")]
    classes = tuple(classes) if isinstance(classes, tuple | list) else (classes,)
    if not classes:
        raise UserError(_allowed_classes_message(value, num_classes, names))
    return tuple(_class_index(y, value, num_classes, names) for y in classes)


def _class_index(y, value, num_classes: int, names: Sequence[str]) -> int:
    """The class of `y`, an index or a name. value: all of `sampling.class`, for the message. Raises: UserError."""
    if y in names:
        return names.index(y)
    if isinstance(y, str) and y.isdecimal():  # of "3,cats"
        y = int(y)
    if type(y) is int and 0 <= y < num_classes:
        if str(y) in names and names.index(str(y)) != y:
            raise UserError(
                f"sampling.class={y} is ambiguous: {names[y]!r} is class {y}, and {str(y)!r} is the name of class "
                f"{names.index(str(y))}; give the name, as in --config.sampling.class=\"'{names[y]}'\""
            )
        return y
    if isinstance(y, str) and names:
        near = closest_names(y, names, count=3)
        raise UserError(
            f"sampling.class={y!r} is not a class of this run; "
            + (f"did you mean {' or '.join(near)}?" if near else f"its classes are {list_names(names, 20)}")
        )
    unnamed = "" if names or not isinstance(y, str) else ", as no class names are stored with these weights"
    raise UserError(_allowed_classes_message(value, num_classes, names) + unnamed)


def _allowed_classes_message(value, num_classes: int, names: Sequence[str]) -> str:
    known = f" ({list_names(names, 20)})" if names else ""
    return f"sampling.class={value} must be classes in 0 ... {num_classes - 1}{known}"
