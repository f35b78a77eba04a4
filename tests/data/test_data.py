"""Batches as a function of (seed, step), and three kinds of sources."""

import pickle

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data.images import Folder

CONFIG = {"download": False, "dataset": "digits", "image_size": 8, "channels": 1}


def test_the_shape_of_examples():
    for size, shape in {8: (8, 8, 1), (4, 6): (4, 6, 1), (): (1,), (2, 3, 4): (2, 3, 4, 1)}.items():
        assert data.example_shape(CONFIG | {"image_size": size}) == shape


def numbers(n):
    """A source whose image i is filled with i."""
    indices = np.arange(n, dtype=np.int32)
    images = indices.astype(np.uint8).reshape(-1, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    return data.InMemory({"image": images, "label": indices})


def test_batches_visit_every_example_once_per_epoch():
    """7 examples in batches of 3: batches span epochs, and 7 batches are exactly 3 epochs."""
    whole = [data.Batches(numbers(7), seed=seed, batch_size=3, num_steps=7) for seed in (0, 1)]
    seen, other = (np.concatenate([batches[step]["label"] for step in range(7)]) for batches in whole)
    for epoch in seen.reshape(3, 7):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(7))
    assert (seen[:7] != seen[7:14]).any() and (other != seen).any()  # another order for each epoch and seed


def test_digits_equal_those_of_scikit_learn():
    """The digits are read from scikit-learn's file, without importing scikit-learn."""
    from sklearn.datasets import load_digits

    digits, held_out = load_digits(), np.arange(1797) % 6 == 5
    for split, chosen in (("train", ~held_out), ("test", held_out)):
        images, labels = data.Digits(split, (8, 8), 1).read(np.arange(chosen.sum())).values()
        np.testing.assert_array_equal(images[..., 0], np.round(digits.images[chosen] * 255 / 16))
        np.testing.assert_array_equal(labels, digits.target[chosen])
    assert len(data.load(CONFIG)) == 1498 and data.load(CONFIG).num_classes == 10
    with pytest.raises(data.DataError, match="'train' and 'test'"):
        data.load({**CONFIG, "split": "validation"})


@pytest.fixture
def folder(tmp_path):
    """Two classes; wide, tall, gray, palette and transparent files, and a file that is no image."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", ".thumbs"):
        (tmp_path / name).mkdir()
    for name, shape, mode in (
        ("cat/wide.png", (20, 40, 3), "RGB"),
        ("cat/gray.jpg", (50, 16), "L"),
        ("dog/clear.png", (8, 8, 4), "RGBA"),
        ("dog/palette.PNG", (30, 30, 3), "P"),
    ):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).convert(mode).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".thumbs" / "hidden.png").write_text("no image either")
    return tmp_path


@pytest.mark.parametrize(("size", "channels"), [((16, 16), 1), ((8, 24), 3)])
def test_folder_resizes_and_converts_images_of_all_modes(folder, size, channels):
    source, _ = load_logged(folder, image_size=size, channels=channels)
    assert source.arrays["image"].shape == (4, *size, channels)
    assert source.num_classes == 2 and source.arrays["label"].tolist() == [0, 0, 1, 1]
    pixels = np.pad(np.full((10, 10, 3), 200, np.uint8), ((0, 0), (10, 10), (0, 0)))
    np.testing.assert_array_equal(data.fit(Image.fromarray(pixels), (10, 10), 3), 200)  # the center


def load_logged(folder, **settings):
    lines = []
    config = {**CONFIG, "dataset": "folder", "data_dir": str(folder), "channels": 3, **settings}
    return data.load(config, log=lines.append), lines


def test_what_a_folder_does_not_read_is_logged(folder):
    frames = [Image.fromarray(np.full((8, 8, 3), 100 * i, np.uint8)) for i in range(2)]
    frames[0].save(folder / "cat" / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "cat" / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    (folder / "dog" / "LICENSE").write_text("no image")
    source, lines = load_logged(folder)
    notes = [
        "Skipped other files: 1 without a suffix, 1 .gif (may be animated: convert them to PNG), 1 .txt.",
        "Dropped the transparency of dog/clear.png.",
        "Read only the first frame of cat/moves.webp.",
    ]
    assert lines == ["5 images of 2 classes: 0 cat, 1 dog.", *notes]
    np.testing.assert_array_equal(source.arrays["image"][1], 0)  # cat/moves.webp
    Image.fromarray(np.array([[0, 257, 65535, 32768]], np.uint16)).save(folder / "deep.png")  # scaled from 16 bits
    source, lines = load_logged(folder, image_size=(1, 4), channels=1)
    advice = "deep.png is outside the subfolders; move every image into the subfolder of its class"
    assert lines[0] == "6 images without classes." and f"No classes: {advice}." in lines and source.num_classes == 0
    assert source.arrays["image"][3].ravel().tolist() == [0, 1, 255, 128]


def test_corrupted_images_are_listed_in_one_error(folder):
    whole = (folder / "cat" / "wide.png").read_bytes()
    (folder / "cat" / "gray.jpg").write_bytes(whole[:60])  # the first of all
    for i in range(300):  # in two chunks
        (folder / "dog" / f"bad{i}.jpg").write_bytes(b"no image")
    with pytest.raises(data.UnreadableFilesError, match="^cannot read 301 images: .* and 296 more; repair") as error:
        load_logged(folder)
    assert "\n" not in str(error.value) and len(error.value.failures) == 301
    copy = pickle.loads(pickle.dumps(error.value))  # as from a worker process
    assert str(copy) == str(error.value) and copy.failures == error.value.failures


def test_folders_and_settings_that_do_not_fit_are_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(data.DataError, match="no images below"):
        load_logged(folder / "empty")
    for other in ({"image_size": (1, 2, 3)}, {"channels": 2}, {"levels": None}):
        with pytest.raises(data.DataError, match="images"):
            load_logged(folder, **other)


def test_images_that_are_not_resized_have_equal_sizes(tmp_path):
    for name, shape in (("a.png", (3, 5)), ("b.png", (7, 4))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / name)
    with pytest.raises(data.DataError, match=r"b\.png is 4x7, but the first image is 5x3; resize"):
        Folder(str(tmp_path), None, 1).read([0, 1])


@pytest.mark.parametrize("function", [data.load, data.check_location])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "folder", "data_dir": "nowhere"}, "is not a folder"),
        ({"dataset": "my data"}, "must be a TFDS data set"),
        ({"dataset": "mnist", "data_dir": "nowhere"}, "prepare it with: python -c .*download_and_prepare"),
    ],
)
def test_data_that_do_not_exist_are_refused(function, settings, words):
    with pytest.raises(data.DataError, match=words):
        function({**CONFIG, **settings})
