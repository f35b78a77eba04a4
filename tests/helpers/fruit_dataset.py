"""The tests' own TFDS data sets: a downloaded data set, and a data set that a person must fetch."""

import io
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NAMES = ["apple", "pear"]


def archive(count: int = 12) -> bytes:
    """A zip with apple/*.png and pear/*.png; image i is filled with 10 i."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8, 1), 10 * i, np.uint8)[..., 0]).save(png, "PNG")
            file.writestr(f"{NAMES[i % 2]}/{i}.png", png.getvalue())
    return buffer.getvalue()


class LocalFruit(tfds.core.GeneratorBasedBuilder):
    """Two classes of gray 8x8 images, from an archive on a local server."""

    VERSION = tfds.core.Version("1.0.0")
    url = ""
    url_infos = None
    fault: Exception | None = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=NAMES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        path = dl_manager.download_and_extract(self.url)
        return {"train": self._generate_examples(path)}

    def _generate_examples(self, path):
        for file in sorted(path.glob("*/*.png")):
            if getattr(self, "fault", None):
                raise self.fault
            yield file.name, {"image": str(file), "label": file.parent.name}


def config(directory, **more):
    base = {"dataset": "local_fruit", "data_dir": str(directory), "split": "train", "image_size": 8, "channels": 1}
    return {**base, "memory_mb": 100, "workers": 0, "download": True, **more}
