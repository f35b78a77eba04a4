"""A source that is read once, into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_jax.data.sources import Source, read_class_names, read_num_classes
from diffusion_jax.errors import UnreadableFilesError

__all__ = ["InMemory"]


class InMemory:
    """A source that is read once: arrays by the names of `Source.read`, such as "image" uint8 [N, *spatial, C]."""

    def __init__(
        self,
        source: Source,
        progress: Callable[[Iterable[int], int], Iterable] = lambda sizes, total: sizes,
        arrays: dict[str, np.ndarray] | None = None,
    ):
        """Reads the source, unless its arrays are given.

        progress: (sizes of the decoded chunks, number of examples) -> sizes, to show the number of decoded examples.
        Raises: UnreadableFilesError with all corrupted images.
        """
        self.num_classes, self.class_names = read_num_classes(source), read_class_names(source)
        self.no_labels_reason = getattr(source, "no_labels_reason", "")
        self.no_conditions_reason = getattr(source, "no_conditions_reason", "")
        self.arrays: dict[str, np.ndarray] = arrays or {}
        if arrays is None:
            self._decode(source, progress)

    def _decode(self, source: Source, progress: Callable[[Iterable[int], int], Iterable]) -> None:
        n, failures = len(source), {}
        try:
            first = source.read([0])
        except UnreadableFilesError as error:
            failures = dict(error.failures)
        else:
            self.arrays = {name: np.empty((n, *array.shape[1:]), array.dtype) for name, array in first.items()}

        def decode(chunk):
            try:
                batch = source.read(chunk)
            except UnreadableFilesError as error:
                failures.update(error.failures)
            else:
                if not failures:
                    for name, array in self.arrays.items():
                        array[chunk] = batch[name]
            return len(chunk)

        chunks = np.array_split(np.arange(n), -(-n // 256))
        with ThreadPoolExecutor() as pool:  # decoding PNG and JPEG releases the interpreter's lock
            for _ in progress(pool.map(decode, chunks), n):
                pass
        if failures:
            raise UnreadableFilesError(failures.items())

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.arrays.items()}
