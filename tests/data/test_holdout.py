"""`data.holdout`: which examples are held out, also after changes to the data, and which sources have no holdout."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.config import ConfigError, default
from diffusion_jax.data import sources
from diffusion_jax.runs.workdir import load_examples
from helpers.array_configs import examples, write_arrays


def settings(**changes):
    return dict(default().data) | {"holdout": 0.3} | changes


def of_folder(path, **changes):
    return settings(dataset="folder", data_dir=str(path), image_size=8, channels=1, cache_decoded=False, **changes)


def of_arrays(path, **changes):
    others = {"image_size": (8,), "channels": 2, "levels": None, "random_flip": False}
    return settings(dataset="arrays", data_dir=str(path), **others, **changes)


def save_images(root, numbers):
    """Gray images with one value each, in two classes by the value's parity."""
    for number in numbers:
        path = root / ("odd" if number % 2 else "even") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)


def values_of(config):
    """Every example's first value, for both splits, and the labels."""
    found = []
    for split in ("train", "test"):
        source = data.load({**config, "split": split})
        batch = source.read(np.arange(len(source)))
        x = batch["image"] if "image" in batch else batch["x"]
        found.append((x.reshape(len(x), -1)[:, 0].tolist(), batch.get("label"), source))
    return found


def test_the_hash_of_an_example_decides():
    keys = [str(i).encode() for i in range(20_000)]
    found = sources.are_held_out(keys, 0.1)
    by_hand = [int(hashlib.sha256(key).hexdigest()[:16], 16) / 2**64 < 0.1 for key in keys]
    assert found.tolist() == by_hand
    assert sources.are_held_out(keys, 0.2)[found].all()  # a larger share holds out these examples and more


def test_images_of_a_folder_keep_their_side_when_others_are_added(tmp_path):
    save_images(tmp_path, range(40))
    (train, train_labels, source), (test, test_labels, held_out) = values_of(of_folder(tmp_path))
    assert sorted(train + test) == list(range(40)) and 3 < len(test) < 22
    for values, labels in ((train, train_labels), (test, test_labels)):
        assert [value % 2 for value in values] == labels.tolist()
    assert source.class_names == held_out.class_names == ("even", "odd")
    keys = [f"{'odd' if i % 2 else 'even'}/{i}.png".encode() for i in range(40)]
    assert sorted(test) == np.flatnonzero(sources.are_held_out(keys, 0.3)).tolist()
    save_images(tmp_path, range(40, 60))
    (more_train, _, _), (more_test, _, _) = values_of(of_folder(tmp_path))
    assert set(train) < set(more_train) and set(test) < set(more_test)
    streamed = values_of(of_folder(tmp_path, memory_mb=0))
    assert [part[0] for part in streamed] == [more_train, more_test]


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_arrays_keep_their_side_in_another_order_and_with_others(tmp_path, memory_mb):
    x, condition = examples("series", 60), np.arange(60.0)[:, None]
    path = write_arrays("series", tmp_path / "x.npz", 60, condition=condition)
    config = of_arrays(path, memory_mb=memory_mb)
    (train, _, source), (test, _, held_out) = values_of(config)
    held = sources.are_held_out([row.tobytes() for row in x], 0.3)
    assert test == x[held, 0, 0].tolist() and train == x[~held, 0, 0].tolist()
    for part, rows in ((source, ~held), (held_out, held)):
        np.testing.assert_array_equal(part.read(np.arange(len(part)))["condition"], condition[rows])
    order = np.random.default_rng(0).permutation(60)
    np.savez(path, x=np.concatenate([examples("series", 30, seed=1), x[order], x[:5]]))
    (more_train, _, _), (more_test, _, _) = values_of(config)
    assert set(train) < set(more_train) and set(test) < set(more_test)


def test_what_has_no_holdout_is_refused_in_one_line(tmp_path):
    file = write_arrays("series", tmp_path / "x.npz")
    given = data.load(of_arrays(file) | {"holdout": 0})
    splits = tmp_path / "splits"
    splits.mkdir()
    for split in ("train", "test"):
        np.save(splits / f"{split}.npy", examples("series"))
    cifar10 = settings(dataset="cifar10", image_size=8, channels=1)
    for function, config, words in (
        (data.load, cifar10, "data.holdout=0.3 .*'cifar10' has its own splits"),
        (data.load, of_arrays(file, split="validation"), "data.split='validation' is not one of data.holdout=0.3"),
        (data.load, of_arrays(file) | {"holdout": 1e-9}, "data.holdout=1e-09 holds out 0 of 24 examples"),
        (data.load, of_arrays(splits), "its own splits"),
        (lambda config: data.load(config, source=given), of_arrays(""), "the program gives a source"),
    ):
        with pytest.raises((data.DataError, ConfigError), match=words):
            function(config)


def test_the_split_of_an_evaluation_has_its_own_name(tmp_path):
    config = of_arrays(write_arrays("series", tmp_path / "x.npz"), split="dev")
    words = "^evaluation.split='dev' is not one of data.holdout=0.3.*use --config.evaluation.split=train"
    with pytest.raises(data.DataError, match=words):
        load_examples("", config, {"data.split": "evaluation.split"}, None)
