"""Quality of generated digits: recognizable, all ten classes, not copies. Reads the .npz of configs/digits.py's samples.

    python benchmarks/digits_quality.py runs/digits/samples/NAME.npz

A small classifier is trained on the real training digits. The threshold is the confidence that it reaches on 95% of the
held-out real digits; the result is the share of samples with at least this confidence. For a conditional model, `agreement`
is the share of samples whose predicted class is their label. Memorization: the median distance of samples to their nearest
training image, divided by that of held-out real digits (at 1 or more, samples are no closer to the training set than new
real digits).
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


def nearest_distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Euclidean distance of each image to the nearest reference; [N]."""
    a, b = features(images), features(references)
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


def fit_classifier() -> tuple[MLPClassifier, np.ndarray, np.ndarray]:
    """A classifier of real digits, its training digits, and the held-out digits."""
    train, test = (data.Digits(split, (8, 8), 1) for split in ("train", "test"))
    (real, labels), (held_out, _) = (source.read(np.arange(len(source))).values() for source in (train, test))
    return MLPClassifier((256,), max_iter=300, random_state=0).fit(features(real), labels), real, held_out


def agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples whose predicted class is their label."""
    classifier, _, _ = fit_classifier()
    return float((classifier.predict(features(images)) == labels).mean())


def quality(images: np.ndarray) -> dict[str, float]:
    """The share of confident samples and its standard error, the share of the rarest digit, and the ratio of distances."""
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
