"""The protocol of data sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["Source"]


class Source(Protocol):
    """Images with labels, read by index from any process.

    A source is picklable, because worker processes read from copies of it; files are opened when they are read. Any object
    with these members is a source and can be passed to `data.Batches` or `data.InMemory`:

        class Stripes:
            num_classes, class_names = 2, ("horizontal", "vertical")

            def __len__(self):
                return 1000

            def read(self, indices):
                labels = np.asarray(indices, np.int32) % 2
                images = np.zeros((len(labels), 8, 8, 1), np.uint8)
                images[labels == 0, ::2] = 255
                images[labels == 1, :, ::2] = 255
                return images, labels

    To make `data.load` find it by name, add it to the function `_open_source` in data/__init__.py.

    num_classes: 0 if there are no labels. class_names: () if they are unknown.
    """

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if there are no labels."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; () if they are unknown."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(images uint8 [n, H, W, C], labels int32 [n]) at n indices. Raises: DataError."""
        ...
