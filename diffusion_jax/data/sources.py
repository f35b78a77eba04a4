"""The protocol of a source of examples, arrays in memory, and sources that are made from another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from diffusion_jax.errors import UnreadableFilesError

__all__ = ["DerivedSource", "InMemory", "SelectedExamples", "Source", "is_in_memory", "read_classes"]


@runtime_checkable
class Source(Protocol):
    """Examples with labels or conditions, read by index from any process.

    A source is picklable, because worker processes read from copies of it; files are opened when they are read. Any object
    with these members is a source and can be passed to `data.Batches` or `data.InMemory.load`:

        class Stripes:
            num_classes, class_names = 2, ("horizontal", "vertical")

            def __len__(self):
                return 1000

            def read(self, indices):
                labels = np.asarray(indices, np.int32) % 2
                images = np.zeros((len(labels), 8, 8, 1), np.uint8)
                images[labels == 0, ::2] = 255
                images[labels == 1, :, ::2] = 255
                return {"image": images, "label": labels}

    `runs.train.run` takes one as `source`. To name one on a command line, write a function of `config.data` that returns it,
    in a module that Python can import: `--config.data.dataset=module:function`.

    Two attributes are optional: num_classes, 0 if it is missing, for no labels; class_names, () if it is missing, for unknown
    names.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of n examples, at these indices, by name. Raises: DataError.

        Either "image", uint8 [n, *spatial, C]; or "x", real numbers [n, *spatial, C] in the units of the data, which
        `data.Normalized` standardizes. There are 0 to 3 spatial axes: none for vectors, one for series, two for images, three
        for volumes. "label", int32 [n], is optional, and so is "condition", real numbers [n, D] or [n, *spatial, K].
        """
        ...


def read_classes(source: Source) -> tuple[int, tuple[str, ...]]:
    """The optional attributes of a source: (the number of classes, their names)."""
    return getattr(source, "num_classes", 0), tuple(getattr(source, "class_names", ()))


class InMemory:
    """A source of arrays by the names of `Source.read`, such as "image" uint8 [N, *spatial, C]."""

    def __init__(self, arrays: Mapping[str, np.ndarray], num_classes: int = 0, class_names: Sequence[str] = ()):
        self.arrays, self.num_classes, self.class_names = dict(arrays), num_classes, tuple(class_names)

    @classmethod
    def load(
        cls, source: Source, progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes
    ) -> InMemory:
        """All examples of a source.

        progress: (sizes of the decoded chunks, number of examples) -> sizes, to show the number of decoded examples.
        Raises: UnreadableFilesError with all corrupted images.
        """
        n, failures = len(source), {}

        def read(indices):
            try:
                return source.read(indices)
            except UnreadableFilesError as error:
                failures.update(error.failures)
                return {}

        def decode(chunk):
            batch = read(chunk)
            if not failures:
                for name, array in arrays.items():
                    array[chunk] = batch[name]
            return len(chunk)

        arrays = {name: np.empty((n, *array.shape[1:]), array.dtype) for name, array in read([0]).items()}
        with ThreadPoolExecutor() as pool:  # decoding PNG and JPEG releases the interpreter's lock
            for _ in progress(pool.map(decode, np.array_split(np.arange(n), -(-n // 256))), n):
                pass
        if failures:
            raise UnreadableFilesError(failures.items())
        return cls(arrays, *read_classes(source))

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.arrays.items()}


class DerivedSource:
    """A source that is made from another one and has its classes."""

    def __init__(self, source: Source):
        self.source = source
        self.num_classes, self.class_names = read_classes(source)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self.source.read(indices)


def is_in_memory(source: Source) -> bool:
    """Whether a source, or the one that it is made from, is in memory, so that its batches need no other processes."""
    while isinstance(source, DerivedSource):
        source = source.source
    return isinstance(source, InMemory)


class SelectedExamples(DerivedSource):
    """The examples of a source at some indices [N]."""

    def __init__(self, source: Source, indices: np.ndarray):
        super().__init__(source)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self.source.read(self._indices[indices])
