"""The class names of a folder of images, and their way to samples and pictures."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, pretrained
from diffusion_jax.errors import UserError
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import sample, sampling, workdir
from diffusion_jax.runs.workdir import check_source
from helpers.configs import conditional
from helpers.work_directories import untrained

BASE = {"dataset": "folder", "split": "train", "image_size": 8, "channels": 3, "memory_mb": 100, "workers": 0}


def write(path, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (8, 8, len(mode)) if len(mode) > 1 else (8, 8)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path, **options)


def load(folder, **more):
    said = []
    return data.load({**BASE, "data_dir": str(folder), **more}, log=said.append), said


@pytest.fixture
def pets(tmp_path):
    for name in ("cats", "birds", "dogs"):
        for i in range(2):
            write(tmp_path / name / f"{i}.png")
    return tmp_path


def test_skipped_and_dropped_images_are_logged(pets):
    frames = [Image.fromarray(np.full((8, 8, 3), 100 * i, np.uint8)) for i in range(2)]
    frames[0].save(pets / "cats" / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(pets / "cats" / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    (pets / "dogs" / "notes.txt").write_text("no image")
    (pets / "dogs" / "LICENSE").write_text("no image")
    write(pets / "dogs" / "clear.png", "RGBA")
    source, said = load(pets)
    assert said == [
        "8 images of 3 classes: 0 birds, 1 cats, 2 dogs.",
        "Skipped other files: 1 without a suffix, 1 .gif (may be animated: convert them to PNG), 1 .txt.",
        "Dropped the transparency of dogs/clear.png.",
        "Read only the first frame of cats/moves.webp.",
    ]
    np.testing.assert_array_equal(source.arrays["image"][4], 0)  # cats/moves.webp


def test_an_image_outside_the_subfolders_is_named(pets):
    write(pets / "cover.png")
    source, said = load(pets)
    advice = "cover.png is outside the subfolders; move every image into the subfolder of its class"
    assert said == ["7 images without classes.", f"No classes: {advice}."] and source.class_names == ()
    with pytest.raises(
        UserError, match=r"has no labels \(an array .label., or a subfolder .*\); use model.num_classes=0"
    ):
        check_source(conditional(), source)


def test_all_corrupted_images_are_listed_in_one_error(pets):
    whole = (pets / "cats" / "0.png").read_bytes()
    (pets / "birds" / "0.png").write_bytes(whole[:60])  # the first of all
    (pets / "dogs" / "0.png").write_bytes(b"no image")
    for i in range(300):  # in two chunks
        (pets / "cats" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(data.UnreadableFilesError, match="^cannot read 302 images: .* and 297 more; repair") as error:
        load(pets)
    assert "\n" not in str(error.value) and len(error.value.failures) == 302
    copy = pickle.loads(pickle.dumps(error.value))  # as from a worker process
    assert str(copy) == str(error.value) and copy.failures == error.value.failures


def test_class_names_are_stored_with_the_run_and_must_not_change(pets, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "checkpoints" / "1" / "digests.json").write_text("{}")  # without a checkpoint nothing is compared
    workdir.check_data(load(pets)[0], RunDir(run))
    stored = json.loads((run / "data.json").read_text())
    assert stored["classes"] == ["birds", "cats", "dogs"]
    workdir.check_data(load(pets)[0], RunDir(run))
    (pets / "cats").rename(pets / "cots")
    with pytest.raises(UserError, match="classes birds, cats, dogs then, birds, cots, dogs now.*remove .*data.json"):
        workdir.check_data(load(pets)[0], RunDir(run))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = untrained(tmp_path_factory.mktemp("named") / "run", conditional())
    names = [*"0123456", "tabby cat", "9", "fox"]
    (directory / "data.json").write_text(json.dumps({"images": 1, "sha256_of_some": "", "classes": names}))
    return directory, names


def chosen(trained, label):
    directory, _ = trained
    config = conditional(**{"sampling.label": label})
    names = workdir.read_class_names(config, directory)
    return sampling.resolve_sampling(config, pretrained.from_config(config, class_names=names)).classes


@pytest.mark.whole
@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("(fox,tabby cat)", (9, 7)),
        ("fox,3", (9, 3)),
        (("fox", 7), (9, 7)),
        ("9", (8,)),  # a name, quoted
        (3, (3,)),
    ],
)
def test_classes_can_be_given_by_name(trained, label, classes):
    assert chosen(trained, label) == classes


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (9, "sampling.class=9 is ambiguous: '9' is the name of class 8; give the name"),
        ("fix", r"sampling.class=fix must be classes in 0 \.\.\. 9 \(0, .*\); did you mean fox\?"),
    ],
)
def test_unknown_classes_are_refused(trained, label, message):
    with pytest.raises(UserError, match=message):
        chosen(trained, label)


def test_class_names_are_read_from_the_run_that_has_them(trained, tmp_path):
    directory, names = trained
    assert workdir.read_class_names(conditional(), directory) == tuple(names)
    assert workdir.read_class_names(conditional(), tmp_path) == ()
    assert workdir.read_class_names(conditional(init_from=str(directory)), tmp_path) == tuple(names)
    plain = conditional(**{"model.num_classes": 0, "model.label_dropout": 0.0, "sampling.classifier": str(directory)})
    assert workdir.read_class_names(plain, tmp_path) == tuple(names)


def test_samples_of_named_classes_have_labels_and_captions(trained):
    directory, names = trained
    drawn = sample.run(conditional(**{"sampling.label": "(fox,tabby cat)", "sampling.steps": 2}), directory)
    assert np.load(drawn.path)["arr_1"].tolist() == [9, 7, 9, 7, 9, 7]
    assert sampling.class_captions(np.array([0, 8, 12]), names) == ["class 0", "class 8: 9", "class 12"]
