"""A user's sources: the returned arrays are checked at the start and in every batch."""

import pickle

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import default

X = np.random.default_rng(0).standard_normal((600, 4))


class Function:
    """A source that returns the result of a function of the indices."""

    def __init__(self, function, **attributes):
        self.function = function
        vars(self).update(attributes)

    def __len__(self):
        return len(X)

    def read(self, indices):
        return self.function(np.asarray(indices))


def settings(**changes):
    return dict(default().data) | {"levels": None, "random_flip": False, "image_size": (), "channels": 4} | changes


def later(first, others):
    """Returns `first` for a batch with small indices, such as the first example's, and `others` for all other batches."""
    return lambda i: first(i) if (i < 200).all() else others(i)


def of_x(i):
    return {"x": X[i]}


def labeled(i):
    return {"x": X[i], "label": i % 3}


@pytest.mark.parametrize("memory_mb", [0, 2048])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (later(lambda i: {"x": np.ones((len(i), 4), int)}, of_x), r'"x" float64 .*; its .*"x" int64 \[\d+, 4\]$'),
        (later(of_x, lambda i: {"x": X[i, :1]}), r'"x" float64 \[\d+, 1\]; its .*"x" float64 \[\d+, 4\]$'),
        (later(of_x, lambda i: {"x": np.ones((len(i), 5))}), r'\[\d+, 5\]; its .*"x" float64 \[\d+, 4\]$'),
        (later(labeled, of_x), r'\d\]; its .*"x" .*, "label" int'),
        (later(of_x, labeled), r'"label" int64 \[\d+\]; its .*"x" float64 \[\d+, 4\]$'),
        (lambda i: {"x": X[i], "label": i % 4}, "labels from 0 to 3; num_classes=3 allows 0 ... 2"),
        (lambda i: {"x": X[i], "label": i % 3 - 1}, "labels from -1 to .*; num_classes=3"),
    ],
)
def test_a_batch_unlike_the_first_example_is_refused(memory_mb, function, words):
    with pytest.raises(data.DataError, match=words) as error:
        data.load(settings(memory_mb=memory_mb), source=Function(function, num_classes=3)).read(np.arange(150, 400))
    assert "\n" not in str(error.value) and "read at the indices" in str(error.value)


IMAGES = np.zeros((600, 4), np.uint8)


@pytest.mark.parametrize(
    ("changes", "arrays", "words"),
    [
        ({}, {"x": X, "label": np.zeros((600, 1), int)}, r'"label" as int64 \[4, 1\]; it must be integers \[n\]'),
        ({}, {"x": X, "condition": X[:, 0]}, r'"condition" as float64 \[4\]; it must be numbers \[n, D\]'),
        ({}, {"x": X, "condition": X + 1j}, r'"condition" as complex128 \[4, 4\]'),
        ({}, {"x": X, "labels": X}, '"label", "condition" and "condition_missing"; got \'x\', \'labels\''),
        (
            {},
            {"x": X, "condition": X, "condition_missing": np.zeros(600)},
            r'"condition_missing" as float64 \[4\]; .* bool',
        ),
        (
            {},
            {"x": X, "condition_missing": np.zeros(600, bool)},
            r'"condition_missing" as bool \[4\]; it must be bool \[n\] beside "condition"',
        ),
        ({}, {"x": X, "image": IMAGES}, "must return .* got 'x', 'image'"),
        ({}, {"image": IMAGES}, "data.levels=None, but the data are uint8 .*use data.levels=256"),
        ({"levels": 256}, {"x": IMAGES}, '"x" as uint8; give uint8 as image'),
        ({"levels": 256}, {"x": X}, "data.levels=256, but the data are float64.*use data.levels=None"),
    ],
)
def test_examples_that_do_not_fit_the_config_are_refused_in_one_line(changes, arrays, words):
    with pytest.raises(data.DataError, match=words) as error:
        data.check_examples(settings(**changes), data.InMemory(arrays))
    assert "\n" not in str(error.value)


def hundred(config):
    return data.InMemory({"x": np.full((100, *data.example_shape(config)), 2.0, np.float32)})


def failing(config):
    raise RuntimeError("no such server")


def test_a_source_is_found_by_the_name_of_its_function():
    assert len(data.load(settings(dataset=f"{__name__}:hundred"))) == 100
    for name, words in (
        (f"{__name__}:failing", "raises RuntimeError: no such server"),
        ("no_module_of_this_name:f", "cannot be imported"),
    ):
        with pytest.raises(data.DataError, match=words):
            data.load(settings(dataset=name))


def lists(i):
    return {"x": X[i].tolist(), "label": (i % 2).tolist()}


def test_lists_are_arrays_and_classes_stay():
    source = Function(lists, num_classes=2, class_names=("even", "odd"))
    source = pickle.loads(pickle.dumps(data.load(settings(memory_mb=0), source=source)))
    batch = source.read(np.array([3, 0]))
    assert batch["x"].dtype == np.float64 and batch["label"].tolist() == [1, 0]
    assert data.describe(source) == "600 examples of 2 classes: 0 even, 1 odd"


def test_a_line_of_the_registry_adds_a_data_set(monkeypatch):
    class Stripes(Function, data.NamedSource):
        @classmethod
        def from_config(cls, config):
            return cls(lambda i: {"image": np.zeros((len(i), 8, 8, 1), np.uint8), "label": i % 2}, num_classes=2)

    monkeypatch.setitem(data.SOURCES, "stripes", Stripes)
    config = dict(default().data) | {"dataset": "stripes", "image_size": 8, "channels": 1}
    lines = []
    assert data.is_in_memory(data.load(config, log=lines.append)) and lines == ["600 images of 2 classes."]
    assert data.has_splits(config) and data.origin(config) == "stripes:train"
    with pytest.raises(data.DataError, match="data.holdout.*'stripes' has its own splits"):
        data.load(config | {"holdout": 0.5})
