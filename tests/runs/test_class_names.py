"""The class names of a folder of images, and their way to samples and pictures."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, training
from diffusion_jax.errors import UserError
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import sample, sampling_conditions, sampling_setup, workdir
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


def test_the_subfolders_of_a_folder_are_its_classes(pets):
    source, said = load(pets)
    assert said == ["6 images of 3 classes: 0 birds, 1 cats, 2 dogs."]
    assert source.class_names == ("birds", "cats", "dogs") and source.arrays["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert load(pets, memory_mb=0)[1] == said


def test_skipped_and_dropped_images_are_logged(pets, own_cache):
    frames = [Image.fromarray(np.full((8, 8, 3), 100 * i, np.uint8)) for i in range(2)]
    frames[0].save(pets / "cats" / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(pets / "cats" / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    (pets / "dogs" / "notes.txt").write_text("no image")
    (pets / "dogs" / "LICENSE").write_text("no image")
    (pets / "dogs" / ".hidden").write_text("left out without a word")
    write(pets / "dogs" / "clear.png", "RGBA")
    Image.fromarray(np.zeros((8, 8), np.uint8), "L").convert("P").save(pets / "dogs" / "key.png", transparency=0)
    source, said = load(pets)
    assert said == [
        "9 images of 3 classes: 0 birds, 1 cats, 2 dogs.",
        "Skipped other files: 1 without a suffix, 1 .gif (may be animated: convert them to PNG), 1 .txt.",
        "Dropped the transparency of dogs/clear.png, dogs/key.png.",
        "Read only the first frame of cats/moves.webp.",
    ]
    np.testing.assert_array_equal(source.arrays["image"][4], 0)  # cats/moves.webp
    with pytest.raises(data.DataError, match=r"it has only 1 \.gif"):
        (pets / "other").mkdir()
        frames[0].save(pets / "other" / "a.gif")
        load(pets / "other")


def test_an_image_outside_the_subfolders_is_named(pets):
    write(pets / "cover.png")
    source, said = load(pets)
    advice = "cover.png is outside the subfolders; move every image into the subfolder of its class"
    assert said == ["7 images without classes.", f"No classes: {advice}."] and source.class_names == ()
    with pytest.raises(
        UserError, match=r"has no labels \(an array .label., or a subfolder .*\); use model.num_classes=0"
    ):
        check_source(conditional(), source)
    for i in range(5):
        write(pets / f"stray{i}.png")
    assert "cover.png, stray0.png, stray1.png and 3 more are outside" in load(pets)[1][1]


def test_all_corrupted_images_are_listed_in_one_error(pets):
    whole = (pets / "cats" / "0.png").read_bytes()
    (pets / "birds" / "0.png").write_bytes(whole[:60])  # the first of all
    (pets / "dogs" / "0.png").write_bytes(b"no image")
    with pytest.raises(data.DataError, match="^cannot read 2 images: .*birds/0.png: .*; .*dogs/0.png: not an image"):
        load(pets)
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


def chosen(trained, label, part="classes"):
    directory, _ = trained
    config = conditional(**{"sampling.label": label})
    built = training.build_program(config)
    names = workdir.read_class_names(config, directory)
    return getattr(sampling_setup.SamplingSetup(config, built.model, built.schedule, built.mesh, names), part)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("fox", (9,)),
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
        (10, r"sampling.class=10 must be classes in 0 \.\.\. 9 \(0, 1, 2, .*, tabby cat, 9, fox\)"),
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


def test_samples_of_named_classes_have_captions(trained, monkeypatch):
    directory, _ = trained
    captions = []
    real = sample.pictures.draw_samples
    monkeypatch.setattr(sample.pictures, "draw_samples", lambda *args: captions.append(args[2]) or real(*args))
    drawn = sample.run(conditional(**{"sampling.label": "(fox,tabby cat)", "sampling.steps": 2}), directory)
    assert np.load(drawn.path)["arr_1"].tolist() == [9, 7, 9, 7, 9, 7]
    assert captions == [["class 9: fox", "class 7: tabby cat"] * 3]
    assert "_class9-7_" in drawn.path.name
    assert sampling_conditions.class_captions(np.array([0, 8, 12]), trained[1]) == ["class 0", "class 8: 9", "class 12"]
