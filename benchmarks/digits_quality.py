"""Are sampled digits digits, all ten, and not copies? For the .npz that --mode=sample writes for configs/digits.py.

    python benchmarks/digits_quality.py runs/digits/samples/NAME.npz

A small classifier learns the real training digits. Its confidence that 95% of the held-out real digits reach is the bar; the
figure is the share of samples that reach it. For a conditional model, also the share in which it sees the digit asked for.
Memorization: the median distance of samples to their nearest training image, over that of held-out real digits (1 and
more: samples stand no closer to the training set than new real digits do).
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from sklearn.neural_network import MLPClassifier

from diffusion_jax import data


def features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] as float [N, 64] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Euclidean distance of each image to its nearest one of `among`; [N]."""
    a, b = features(images), features(among)
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


def judge() -> tuple[MLPClassifier, np.ndarray, np.ndarray]:
    """A classifier of real digits, those it has learned from, and those held out."""
    train, test = (data.Digits(split, (8, 8), 1) for split in ("train", "test"))
    (real, labels), (held_out, _) = (source.read(np.arange(len(source))) for source in (train, test))
    return MLPClassifier((256,), max_iter=300, random_state=0).fit(features(real), labels), real, held_out


def agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples in which the classifier sees the digit that was asked for."""
    classifier, _, _ = judge()
    return float((classifier.predict(features(images)) == labels).mean())


def quality(images: np.ndarray) -> dict[str, float]:
    """confident (share at the bar) and its standard_error; rarest (share of the rarest digit); distance (the ratio)."""
    classifier, real, held_out = judge()
    bar = np.quantile(classifier.predict_proba(features(held_out)).max(axis=1), 0.05)
    probability = classifier.predict_proba(features(images))
    confident = (probability.max(axis=1) >= bar).mean()
    return {
        "confident": float(confident),
        "standard_error": float(np.sqrt(confident * (1 - confident) / len(images))),
        "rarest": float(np.bincount(probability.argmax(axis=1), minlength=10).min() / len(images)),
        "distance": float(np.median(nearest(images, real)) / np.median(nearest(held_out, real))),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with np.load(sys.argv[1]) as arrays:
        figures = quality(arrays["arr_0"])
        if "arr_1" in arrays:
            figures["agreement"] = agreement(arrays["arr_0"], arrays["arr_1"])
        print({name: round(value, 3) for name, value in figures.items()})
