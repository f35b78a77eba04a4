"""Commands that cannot be run: one clear line and exit code 2, in seconds."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import cli, config, pretrained
from diffusion_jax.errors import CheckpointError, ConfigError, DataError, PretrainedError, UserError
from diffusion_jax.runs import console, devices, train, workdir
from helpers.configs import tiny_config, upsampler_config
from helpers.launcher import launch
from helpers.program import finish, start, tiny_flags

# Leaf, value, and words of the message.
BAD = [
    ("training.num_steps", 0, "training.num_steps=0"),
    ("training.batch_size", 0, "training.batch_size=0"),
    ("training.batch_size", -8, "training.batch_size=-8"),
    ("training.log_every", 0, "training.log_every=0"),
    ("training.checkpoint_every", 0, "training.checkpoint_every=0"),
    ("training.checkpoints_kept", 0, "training.checkpoints_kept=0"),
    ("training.checkpoint_keep_every", -1, "training.checkpoint_keep_every=-1"),
    ("training.sample_every", -1, "training.sample_every=-1"),
    ("training.steps_per_call", 3, "training.steps_per_call=3"),
    ("training.stall_timeout", -1.0, "training.stall_timeout=-1"),
    ("seed", -1, "seed=-1"),
    ("seed", 2**40, "seed="),
    ("mesh.data", 3, "mesh.data=3"),
    ("mesh.data", 0, "mesh.data=0"),
    ("mesh.fsdp", 5, "mesh.fsdp=5"),
    ("data.dataset", "folder", "data.data_dir"),
    ("data.image_size", 0, "data.image_size=0"),
    ("data.channels", 2, "data.channels=2"),
    ("data.split", "validation", "data.split='validation'"),
    ("data.levels", 1, "data.levels=1"),
    ("data.memory_mb", -1, "data.memory_mb=-1"),
    ("model.channels", 0, "model.channels=0"),
    ("model.channels", 30, "does not divide a layer of 30 channels"),
    ("model.num_groups", 0, "model.num_groups=0"),
    ("model.num_heads", 0, "model.num_heads=0"),
    ("model.num_res_blocks", -1, "model.num_res_blocks=-1"),
    ("model.attention_levels", (7,), "attention"),
    ("model.dtype", "float31", "float31"),
    ("model.dropout", 2.0, "dropout"),
    ("model.num_classes", 3, "the data has 10 classes"),
    ("model.num_classes", -1, "num_classes"),
    ("model.label_dropout", 2.0, "label_dropout"),
    ("diffusion.schedule", "linaer", "linaer"),
    ("diffusion.num_timesteps", 0, "num_timesteps"),
    ("diffusion.prediction", "epsilon", "epsilon"),
    ("diffusion.variance", "learned", "learned"),
    ("diffusion.loss", "l2", "l2"),
    ("diffusion.weighting", "snrr", "snrr"),
    ("diffusion.timestep_sampler", "random", "random"),
    ("optimizer.name", "sgdd", "sgdd"),
    ("optimizer.schedule", "step", "step"),
    ("optimizer.learning_rate", -1.0, "learning_rate"),
    ("optimizer.learning_rate", float("nan"), "learning_rate"),
    ("optimizer.warmup_steps", -5, "warmup_steps"),
    ("optimizer.b1", 1.5, "b1"),
    ("optimizer.weight_decay", -1.0, "weight_decay"),
    ("optimizer.grad_clip", -1.0, "grad_clip"),
    ("ema.decay", 2.0, "ema.decay=2"),
    ("init_from", "/nowhere", "/nowhere"),
]

# Flags, and words of the message: what only a launch shows.
LAUNCHES = [
    (["--config=configs/digits.py", "--config.training.num_step=3"], "did you mean training.num_steps?"),
    (["--config=configs/digits.py", "--config.trainng.num_steps=3"], "did you mean training.num_steps?"),
    (
        ["--config=configs/digits.py", "--config.training.num_steps=many"],
        "must be a whole number of at least 1; write it as 10000 or 1e4",
    ),
    (["--config=configs/digits.py", "--config.training.batch_size=0"], "training.batch_size=0"),
    (["--config=configs/digits.py", "--config.mesh.data=3"], "mesh.data=3"),
    (["--config=configs/digits.py", "--config.model.channels=30"], "does not divide a layer of 30 channels"),
    (["--config=configs/nothing.py"], "no such file"),
    (["--config=configs/digits.py", "--mode=trian"], "--mode: invalid choice: 'trian'"),
    (["--config=configs/digits.py", "--xyz=3"], "unknown flag --xyz; --help lists all flags"),
    ([], "holds no run whose config could be used"),
    (["--config=digits", "--config.diffusion.loss=classify"], "such as --config=digits_classifier"),
    (["--config=digits", "--config.sampling.steps=0"], "must be None or a whole number of at least 1"),
    (["--config=digits", "--config.model.dtype=float16"], "must be float32 or bfloat16"),
    (["--config=configs/digits.py", "surplus"], "surplus"),
    (["--config=configs/digits.py", "--config.seed=-1"], "seed=-1"),
    (["--config=configs/digits.py", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
    (["--config=configs/digits.py", "--config.mesh.fsdp=two"], "two"),
    (["--config=configs/digits.py", "--config.training.accumulation_steps=7"], "nearest: 63 or 70"),
    (["--config=configs/digits.py", "--config.training.steps_per_call=7"], "training.steps_per_call=7"),
    (["--config=configs/digits.py", "--config.data.split=validation"], "'train' and 'test'"),
    (["--config=configs/digits.py", "--config.data.dataset=no_such_set"], "no_such_set"),
    (["--config=configs/digits.py", "--config.model.dtype=float31"], "float31"),
    (["--config=configs/digits.py", "--config.diffusion.prediction=noise"], "noise"),
    (["--config=configs/digits.py", "--config.optimizer.name=sgdd"], "sgdd"),
    (["--config=configs/digits.py", "--config.evaluation.metrics=('fad',)"], "'fad' is not allowed; did you mean fid?"),
    (["--config=configs/digits.py", "--mode=sample"], "train first"),
    (["--config=configs/digits.py", "--mode=train_classifier"], "not a classifier"),
    (["--config=configs/digits_classifier.py", "--mode=sample"], "classifier"),
    (["--config=configs/digits.py", "--config.data.dataset=folder", "--config.data.data_dir=/nowhere"], "/nowhere"),
    (["--config=configs/digits.py", "--config.init_from=/nowhere"], "/nowhere"),
    (["--config=configs/digits.py", "--workdir=/proc/run"], "/proc/run"),
    (["--config=configs/digits.py", "--workdir=README.md"], "README.md"),
    (["--config=configs/digits.py", "--mode=evaluate"], "train first"),
    (["--config=configs/digits.py", "--process_id=1"], "must be given together"),
    (["--config=configs/digits.py", "--process_id=x"], "--process_id: invalid int value: 'x'"),
]


# What a first afternoon brings, with what the one line must hold: what is wrong, its value, what is allowed. {} is a folder
# with the files and runs that `wrong` makes; the program is main.py, or with "-m" a module.
TRAIN, SAMPLE, EDIT = "--config=configs/digits.py", "--mode=sample", "--mode=edit"
RUN, UPSAMPLER, IMAGE = "--workdir={}/run", "--workdir={}/upsampler", "--config.editing.image={}/image.png"
SECOND_LAUNCHES = [
    # config files
    (["--config={}/no_function.py"], ["no_function.py defines no function get_config()", "ConfigDict"]),
    (["--config={}/no_python.py"], ["line 1 of ", "no_python.py is not valid Python"]),
    (["--config={}/no_module.py"], ["line 2 of ", "no_module.py", "No module named 'torchvisionn'"]),
    (["--config={}/raising.py"], ["line 6 of ", "raising.py raises TypeError", "'channels'", "many"]),
    (["--config={}/unknown_leaf.py"], ["--config=", "unknown_leaf.py: unknown leaf training.step; did you mean"]),
    (["--config={}/dictionary.py"], ["--config=", "dictionary.py: seed=-1 must be a whole number"]),
    (["--config={}/returning_none.py"], ["returning_none.py: a config must be a nested mapping", "not None"]),
    (["--config=configs/digitz.py"], ["configs/digitz.py: no such file", "such as digits"]),
    (
        ["--config=configs/digits.py:8"],
        ["--config=configs/digits.py:8: ", "takes 0 positional arguments but 1 was given"],
    ),
    (["--config=configs/imagenet_adm.py:64"], ["imagenet_adm.py:64", "known are 128, 256, 256_unconditional, 512"]),
    # overrides
    (
        [TRAIN, "--config.training.num_steps=1.5"],
        ["training.num_steps=1.5", "a whole number of at least 1"],
    ),
    ([TRAIN, "--config.training.num_steps=None"], ["training.num_steps=None", "must be a whole number"]),
    (
        [TRAIN, "--config.optimizer.learning_rate=fast"],
        ["learning_rate=fast", "a number above 0; write it as 0.5 or 2e-4"],
    ),
    ([TRAIN, "--config.model.remat=maybe"], ["model.remat=maybe", "True or False"]),
    ([TRAIN, "--config.training=5"], ["training is a group", "such as training.num_steps"]),
    ([TRAIN, "--config.model.channel_multipliers=(1,two)"], ["model.channel_multipliers=", "two", "positive numbers"]),
    # work directories
    ([TRAIN, "--workdir=README.md/run"], ["--workdir=README.md/run", "README.md is a file; give a directory"]),
    ([TRAIN, "--workdir="], ["--workdir=DIR is needed"]),
    ([TRAIN, "--workdir=/proc/run"], ["--workdir=/proc/run: ", "/proc", "; give another directory"]),
    ([SAMPLE, "--workdir={}/typo"], ["config.json", "training.num_step; ", "did you mean training.num_steps?"]),
    ([SAMPLE, "--workdir={}/wrong_type"], ["config.json", "training.num_steps='many'", "must be a whole number"]),
    ([SAMPLE, "--workdir={}/no_group"], ["config.json", "training is a group"]),
    # sampling and evaluation
    ([SAMPLE, RUN, "--config.sampling.steps=True"], ["sampling.steps=True", "a whole number of at least 1"]),
    (
        [SAMPLE, RUN, "--config.sampling.classifier=/nowhere"],
        ["sampling.classifier=/nowhere: ", "no such file or folder"],
    ),
    ([SAMPLE, UPSAMPLER, "--config.sampling.low_resolution={}/junk.npz"], ["junk.npz", "neither a folder nor an .npz"]),
    (
        ["--mode=evaluate", RUN, "--config.evaluation.likelihood=False", "--config.evaluation.num_samples=0"],
        ["evaluation.likelihood=False and evaluation.num_samples=0", "set either"],
    ),
    (
        ["--mode=evaluate", RUN, "--config.evaluation.likelihood=False", "--config.evaluation.reference_split=dev"],
        ["evaluation.reference_split='dev'", "'train' and 'test'"],
    ),
    # images to edit, and masks
    ([EDIT, RUN, IMAGE, "--config.editing.mask={}/black.png"], ["black.png", "black everywhere", "to be kept white"]),
    ([EDIT, RUN, "--config.editing.image={}/junk.npz"], ["editing.image=", "junk.npz", "cannot be read as an image"]),
    (
        [EDIT, RUN, IMAGE, "--config.editing.num_samples=0", "--config.editing.task=sdedit"],
        ["editing.num_samples=0 must be a whole number of at least 1"],
    ),
    # weights
    (["--pretrained={}/junk.npz"], ["--pretrained=", "junk.npz", "neither safetensors nor PyTorch's"]),
    (["-m", "diffusion_jax.evaluation", "{}/junk.npz", "{}/junk.npz"], ["junk.npz is not an .npz", "numpy.savez"]),
    (["-m", "diffusion_jax.evaluation", "{}/junk.npz"], ["samples", "--help"]),
    (["-m", "diffusion_jax.evaluation", "table", "{}/run"], ["nothing has been measured there", "--mode=evaluate"]),
    (["-m", "diffusion_jax.pretrained", "inspct", "{}/run"], ["'inspct'", "inspect", "convert", "--help"]),
    (["-m", "diffusion_jax.pretrained", "convert", "{}/run"], ["convert needs PATH and TO", "--help"]),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The folder of SECOND_LAUNCHES."""
    folder = tmp_path_factory.mktemp("wrong")
    digits = "from diffusion_jax.config import experiment\n\n\ndef get_config():\n    config = experiment('digits')\n"
    for name, text in {
        "no_function": "config = 1\n",
        "no_python": "def get_config(:\n    pass\n",
        "no_module": "import math\nimport torchvisionn\n",
        "raising": f"{digits}    config.model.channels = 'many'\n    return config\n",
        "unknown_leaf": f"{digits}    config.training.step = 3\n    return config\n",
        "dictionary": "def get_config():\n    return {'seed': -1}\n",
        "returning_none": digits,
    }.items():
        (folder / f"{name}.py").write_text(text)
    for name, stored in {
        "typo": {"training": {"num_step": 3}},
        "wrong_type": {"training": {"num_steps": "many"}},
        "no_group": {"training": 5},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(stored))
    (folder / "junk.npz").write_bytes(b"junk")
    for name, value in {"image": 90, "black": 0}.items():
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / f"{name}.png")
    for name, stored in {"run": tiny_config(**{"evaluation.num_samples": 10}), "upsampler": upsampler_config()}.items():
        (folder / name).mkdir()
        workdir.write_config(stored, folder / name)
    return folder


@pytest.mark.whole
@pytest.mark.parametrize(("flags", "words"), LAUNCHES, ids=[" ".join(flags) for flags, _ in LAUNCHES])
def test_a_launch_is_refused(flags, words, tmp_path):
    code, _, err = launch(f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1 and len(err) < 500, err
    assert not (tmp_path / "run").exists()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"spacing": "foo"}, "sampling.spacing='foo' must be leading, trailing, "),
        ({"sampler": "foo"}, "sampling.sampler='foo' must be ddpm, ddim, "),
        ({"label": "cats"}, "sampling.class=cats, but the model has no classes"),
        ({"steps": "ddim5"}, "sampling.steps='ddim5' must be None or a whole number of at least 1 or a tuple"),
        ({"steps": 20.5}, "20.5"),
        ({"steps": (3, 4)}, None),
        ({"steps": (3, 4), "spacing": "trailing"}, "are several numbers"),
        ({"num_samples": 0}, "sampling.num_samples=0 must be a whole number of at least 1"),
        ({"low_resolution": "small.npz"}, "is for models that enlarge images"),
        ({"classifier": "somewhere", "classifier_form": "mean", "sampler": "ddim"}, "use sampling.sampler='ddpm'"),
        ({"steps": (3, 4), "spacing": "openai"}, None),
        ({"steps": (3, 4.5, 900), "spacing": "given"}, None),
        ({"classifier": "somewhere", "label": 3}, None),  # which may know classes
    ],
)
def test_training_refuses_what_sampling_would(leaves, words, tmp_path, monkeypatch):
    """Before anything is written or compiled; and takes the rest."""

    def noting(*_):
        raise DataError("taken")

    monkeypatch.setattr("diffusion_jax.runs.recipe_checks.log_notes", noting)
    with pytest.raises((UserError, DataError)) as caught:
        train.run(tiny_config(**{f"sampling.{leaf}": value for leaf, value in leaves.items()}), tmp_path / "run")
    assert (words or "taken") in str(caught.value) and not (tmp_path / "run").exists()


def test_a_class_by_name_is_checked_once_the_data_names_them(tmp_path):
    classes = {"model.num_classes": 10, "model.label_dropout": 0.1}
    for label in ("seven", "(3,seven)"):
        with pytest.raises(
            UserError, match="'seven' is not a class of this run; its classes are|sampling.class=.*seven"
        ):
            train.run(tiny_config(**classes, **{"sampling.label": label}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_finished_run_refuses_a_wrong_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_jax.runs.train._is_finished", lambda *_: True)
    train.run(tiny_config(), tmp_path)
    with pytest.raises(UserError, match="sampling.sampler='foo' must be ddpm, ddim, "):
        train.run(tiny_config(**{"sampling.sampler": "foo"}), tmp_path)


@pytest.mark.whole
@pytest.mark.parametrize(("flags", "words"), SECOND_LAUNCHES, ids=[" ".join(flags) for flags, _ in SECOND_LAUNCHES])
def test_a_first_afternoon_s_mistake_is_one_line(flags, words, wrong, tmp_path):
    arguments = [flag.replace("{}", str(wrong)) for flag in flags]
    program = "main.py"
    if arguments[0] == "-m":
        _, program, *arguments = arguments
    elif not any(flag.startswith("--workdir") for flag in arguments):
        arguments.append(f"--workdir={tmp_path / 'run'}")
    code, _, err = launch(*arguments, program=program)
    assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    assert all(word in err for word in words) and len(err) < 600, err
    assert not (tmp_path / "run").exists()


def test_whole_numbers_may_be_written_with_an_exponent(tmp_path):
    """They reach the config: the message shows the number that was read."""
    overrides = ("--config.training.log_every=1e2", "--config.training.steps_per_call=3.0")
    _, _, err = launch(TRAIN, f"--workdir={tmp_path}", *overrides)
    assert "training.log_every=100 must be a multiple of training.steps_per_call=3" in err, err
    parsed = [config.override({}, {"editing.level": text}).editing.level for text in ("1e4", "3.0", "12", "None")]
    assert parsed == [10_000, 3, 12, None]
    for text in ("1e400", "nan", "0.5", "", "ten"):
        with pytest.raises(ConfigError, match="must be a whole number"):
            config.override({}, {"editing.level": text})


def test_an_unknown_leaf_in_a_stored_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"training": {"num_step": 3}}))
    with pytest.raises(
        UserError, match=r"config.json is not a valid config \(unknown leaf .*; did you mean training.num_st"
    ):
        workdir.load_config(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(PretrainedError, match="did you mean training.num_steps"):
        pretrained.describe(str(tmp_path))


def test_a_rerun_with_the_same_weights_keeps_their_flags(tmp_path):
    stored = tiny_config(init_from="weights.pt", init_flags="preset")
    workdir.write_config(stored, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / "digests.json").write_text("{}")
    flags = ["--pretrained=weights.pt", f"--workdir={tmp_path}"]
    for more in ([], ["--config=digits"]):
        parsed = cli.parse([*flags, *more]).config
        assert (parsed.init_from, parsed.init_flags) == ("weights.pt", "preset")
    assert cli.parse([*flags, "--pretrained_flags=other"]).config.init_flags == "other"


def test_the_compiler_s_options_are_shown_on_request_alone(capsys):
    devices.start()
    assert "Options for XLA" not in capsys.readouterr().out
    devices.start(verbose=True)
    assert capsys.readouterr().out.count("Options for XLA") == 1


def test_bars_count_images(capsys):
    """Of 300 images in two chunks: not "2/2"."""
    assert list(console.progress_over("Reading the images")([256, 44], 300)) == [256, 44]
    assert capsys.readouterr().out.startswith("Reading the images 300/300 (100%)")


@pytest.mark.parametrize(("leaf", "value", "words"), BAD, ids=[f"{leaf}={value}" for leaf, value, _ in BAD])
def test_a_bad_leaf_is_refused(leaf, value, words, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises((UserError, DataError, CheckpointError, PretrainedError, OSError)) as caught:
        train.run(tiny_config(**{leaf: value}), directory)
    text = str(caught.value)
    assert words in text and getattr(caught.value, "exit_code", 2) == 2 and len(text) < 500, text


@pytest.mark.slow
def test_launches_are_refused(tmp_path):
    """One line and exit code 2, each, by the program itself; prints how long the slowest took."""
    seconds = []
    for i, (flags, words) in enumerate(LAUNCHES):
        began = time.monotonic()
        code, _, err = finish(start(f"--workdir={tmp_path / str(i)}", *flags))
        seconds.append(time.monotonic() - began)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, (flags, err)
    print(f"{len(LAUNCHES)} refusals: {min(seconds):.1f} to {max(seconds):.1f} s")


@pytest.mark.whole
def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train.run(tiny_config(**{"training.num_steps": 2}), tmp_path)
    (tmp_path / "config.json").unlink()  # the config was lost
    with pytest.raises(CheckpointError, match="step 2 .* holds another state: params/"):
        train.run(tiny_config(**{"model.channels": 16}), tmp_path)
    code, _, err = finish(start(*tiny_flags(tmp_path, **{"model.channels": 16})))
    assert code == 2 and "another state" in err and len(err.strip().splitlines()) == 1, err
