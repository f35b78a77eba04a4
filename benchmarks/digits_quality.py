"""Checks that generated digits are recognizable, have all ten classes, and are not copies of training digits.

    python benchmarks/digits_quality.py runs/digits/samples/NAME.npz

The .npz has samples of configs/digits.py. A small classifier is trained on the real training digits. The threshold is the
confidence that the classifier reaches on 95% of the held-out real digits; the result is the share of samples with at least
this confidence. For a conditional model, `agreement` is the share of samples whose predicted class is their label.
Memorization is the median distance from samples to the nearest training image, divided by the same distance for held-out
real digits (at 1 or more, samples are no closer to the training set than new real digits).
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from sklearn.neural_network import MLPClassifier

from diffusion_jax import data


def features(images: np.ndarray) -> np.ndarray:
    """Converts uint8 [N, 8, 8, 1] to float [N, 64] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def nearest_distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Returns the Euclidean distance from each image to the nearest reference, [N]."""
    a, b = features(images), features(references)
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


@functools.cache
def fit_classifier() -> tuple[MLPClassifier, np.ndarray, np.ndarray]:
    """Trains a classifier on real digits. Returns: (classifier, training digits, held-out digits)."""
    train, test = (data.Digits(split, (8, 8), 1) for split in ("train", "test"))
    (real, labels), (held_out, _) = (source.read(np.arange(len(source))).values() for source in (train, test))
    return MLPClassifier((256,), max_iter=300, random_state=0).fit(features(real), labels), real, held_out


def agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of samples whose predicted class is their label."""
    classifier, _, _ = fit_classifier()
    return float((classifier.predict(features(images)) == labels).mean())


def quality(images: np.ndarray) -> dict[str, float]:
    """Returns the confident samples' share, its standard error, the rarest digit's share, and the distance ratio."""
    classifier, real, held_out = fit_classifier()
    threshold = np.quantile(classifier.predict_proba(features(held_out)).max(axis=1), 0.05)
    probability = classifier.predict_proba(features(images))
    confident = (probability.max(axis=1) >= threshold).mean()
    return {
        "confident": float(confident),
        "standard_error": float(np.sqrt(confident * (1 - confident) / len(images))),
        "rarest": float(np.bincount(probability.argmax(axis=1), minlength=10).min() / len(images)),
        "distance": float(np.median(nearest_distances(images, real)) / np.median(nearest_distances(held_out, real))),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with np.load(sys.argv[1]) as arrays:
        figures = quality(arrays["arr_0"])
        if "arr_1" in arrays:
            figures["agreement"] = agreement(arrays["arr_0"], arrays["arr_1"])
        print({name: round(value, 3) for name, value in figures.items()})
