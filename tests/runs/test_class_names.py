"""The data's class names, in samples and pictures."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax import data, pretrained
from diffusion_jax.errors import UserError
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import sampling_setup, train, workdir
from helpers.array_configs import array_config
from helpers.configs import conditional
from helpers.work_directories import untrained

NAMES = [*"0123456", "tabby cat", "9", "fox"]


def test_class_names_are_stored_with_the_run_and_must_not_change(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "checkpoints" / "1" / "digests.json").write_text("{}")  # without a checkpoint there is nothing to compare
    images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6, dtype=np.int32) % 3

    def check(*names):
        workdir.check_data(data.InMemory({"image": images, "label": labels}, 3, names), RunDir(run))

    check("birds", "cats", "dogs")
    assert json.loads((run / "data.json").read_text())["classes"] == ["birds", "cats", "dogs"]
    check("birds", "cats", "dogs")
    with pytest.raises(UserError, match="classes birds, cats, dogs then, birds, cots, dogs now.*remove .*data.json"):
        check("birds", "cots", "dogs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = untrained(tmp_path_factory.mktemp("named") / "run", conditional())
    (directory / "data.json").write_text(json.dumps({"images": 1, "sha256_of_some": "", "classes": NAMES}))
    return directory


def test_captions_have_the_names_that_differ_from_the_numbers():
    assert sampling_setup.class_captions(np.array([0, 8, 12]), NAMES) == ["class 0", "class 8: 9", "class 12"]


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("(fox,tabby cat)", [9, 7]),
        ("fox,3", [9, 3]),
        (("fox", 7), [9, 7]),
        ("9", [8]),  # a name, quoted
        (3, [3]),
        (9, "sampling.label=9 is ambiguous: '9' is the name of class 8; give the name"),
        ("fix", r"sampling.label=fix must be classes in 0 \.\.\. 9 \(0, .*\); did you mean fox\?"),
    ],
)
def test_classes_by_number_or_name(label, classes):
    if isinstance(classes, list):
        assert sampling_setup.parse_classes(label, 10, NAMES).tolist() == classes
    else:
        with pytest.raises(UserError, match=classes):
            sampling_setup.parse_classes(label, 10, NAMES)


@pytest.mark.whole
def test_class_names_are_read_from_the_run_that_has_them(trained, tmp_path):
    directory, names = trained, tuple(NAMES)
    assert pretrained.read_class_names(conditional(), directory) == names
    assert pretrained.read_class_names(conditional(), tmp_path) == ()
    assert pretrained.read_class_names(conditional(init_from=str(directory)), tmp_path) == names
    plain = conditional(**{"model.num_classes": 0, "model.label_dropout": 0.0, "sampling.classifier": str(directory)})
    assert pretrained.read_class_names(plain, tmp_path) == names


def test_classes_that_training_would_never_see_are_refused_at_the_launch(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "data" / "abc"[i]).mkdir(parents=True)
        np.save(tmp_path / "data" / "abc"[i] / "0.npy", np.zeros((4, 3), np.float32))
    config = array_config("vectors", tmp_path / "data", **{"model.num_classes": 5, "data.normalization": "none"})
    with pytest.raises(UserError, match="num_classes=5, but the data has 3 classes; use .*num_classes=3, or 0$"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    source = data.load(config.data)
    # A held-out set may lack classes, and a run may have begun with an earlier version.
    workdir.check_source(config, source)
    net = pretrained.from_config(config)
    net = dataclasses.replace(net, class_names=source.class_names)
    config.sampling.label = 4
    capsys.readouterr()
    sampling_setup.resolve_sampling(config, net)
    assert "Note: class 4 is not among the 3 classes" in capsys.readouterr().out
    sampling_setup.resolve_sampling(config, net, read_files=False)  # as training, which repeats no notes
    assert not capsys.readouterr().out
    config.sampling.label = 2
    sampling_setup.resolve_sampling(config, net)
    assert "class" not in capsys.readouterr().out
