"""Commands that cannot be run: one clear line and exit code 2, in seconds."""

import subprocess
import sys

import pytest

from diffusion_jax import cli
from diffusion_jax.errors import DataError, UserError
from diffusion_jax.runs import train, workdir
from helpers.configs import tiny_config
from helpers.launcher import launch
from helpers.paths import ROOT

# Flags, and words in the one-line message: the error, the value, what is allowed. {} is a folder with the files and runs
# that `wrong` makes; the program is main.py, or with "-m" a module.
TRAIN, SAMPLE, RUN = "--config=configs/digits.py", "--mode=sample", "--workdir={}/run"
LAUNCHES = [
    ([TRAIN, "--config.training.num_step=3"], ["did you mean training.num_steps?"]),
    ([TRAIN, "--mode=trian"], ["--mode: invalid choice: 'trian'", "sample"]),
    ([TRAIN, "--xyz=3"], ["unknown flag --xyz; --help lists all flags"]),
    ([TRAIN, "surplus"], ["unexpected argument 'surplus'"]),
    ([], ["no such directory; without --config=NAME, --mode=train reads the directory of a run"]),
    (["--workdir={}"], ["holds no run whose config could be used"]),
    (["--config=digits", "--config.diffusion.loss=classify"], ["use --mode=train_classifier"]),
    ([TRAIN, "--config.training.accumulation_steps=7"], ["nearest: 63 or 70"]),
    ([TRAIN, "--mode=train_classifier"], ["--mode=train_classifier is not for a diffusion model", "use --mode=train"]),
    (["--config=configs/digits_classifier.py", SAMPLE, RUN], ["for a classifier (diffusion.loss=classify)"]),
    ([TRAIN, "--process_id=1"], ["must be given together"]),
    # config files
    (["--config={}/no_python.py"], ["no_python.py raises SyntaxError: ", "line 1)"]),
    (["--config={}/raising.py"], ["line 6 of ", "raising.py raises TypeError", "'channels'", "many"]),
    (["--config={}/returning_none.py"], ["returning_none.py: a config must be a nested mapping", "not None"]),
    (["--config=configs/digitz.py"], ["configs/digitz.py: no such file", "such as digits"]),
    (["--config={}/junk.npz"], ["junk.npz is not a Python file; give FILE.py with get_config()"]),
    # flags without effect
    (
        [TRAIN, "--mode=edit", RUN, "--config.sampling.num_samples=4"],
        ["sampling.num_samples=4 has no effect on --mode=edit; use --config.editing.num_samples=4"],
    ),
    # work directories
    (
        [TRAIN, "--workdir={}/nowhere", "--mode=status"],
        ["no such directory; --mode=status reads the directory of a run"],
    ),
    *(
        ([*config, "--workdir={}/nowhere", f"--mode={mode}"], ["no such directory; ", f"--mode={mode} reads the"])
        for mode, config in (("sample", []), ("sample", [TRAIN]), ("edit", [TRAIN]), ("evaluate", [TRAIN]))
    ),
    ([TRAIN, "--workdir=README.md/run"], ["--workdir=README.md/run", "README.md is a file; give a directory"]),
    ([TRAIN, "--workdir="], ["--workdir=DIR is needed"]),
    ([TRAIN, "--workdir=/proc/run"], ["--workdir=/proc/run", "; give a directory that can be written"]),
    ([TRAIN, "--workdir=http://bucket/run"], ["gs://BUCKET/DIR"]),
    ([SAMPLE, "--workdir={}/typo"], ["config.json is not a valid config", "did you mean training.num_steps?"]),
    # sampling and evaluation
    (
        [SAMPLE, RUN, "--config.sampling.classifier=/nowhere"],
        ["sampling.classifier=/nowhere: ", "no such file or folder"],
    ),
    (
        ["--mode=evaluate", RUN, "--config.evaluation.likelihood=False", "--config.evaluation.num_samples=0"],
        ["evaluation.likelihood=False and evaluation.num_samples=0", "use --config.evaluation.likelihood=True"],
    ),
    (
        ["--mode=evaluate", RUN, "--config.evaluation.likelihood=False", "--config.evaluation.reference_split=dev"],
        ["evaluation.reference_split='dev'", "'train' and 'test'"],
    ),
    # weights
    (["--pretrained={}/junk.npz"], ["--pretrained=", "junk.npz", "neither safetensors nor PyTorch's"]),
    (["weights", "inspct", "{}/run"], ["'inspct'", "inspect", "convert", "--help"]),
    (["weights", "convert", "{}/run"], ["convert and publish need PATH and TO", "--help"]),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The folder of LAUNCHES."""
    folder = tmp_path_factory.mktemp("wrong")
    digits = "from diffusion_jax.config import experiment\n\n\ndef get_config():\n    config = experiment('digits')\n"
    for name, text in {
        "no_python": "def get_config(:\n    pass\n",
        "raising": f"{digits}    config.model.channels = 'many'\n    return config\n",
        "returning_none": digits,
    }.items():
        (folder / f"{name}.py").write_text(text)
    for name in ("typo", "run"):
        (folder / name).mkdir()
    (folder / "typo" / "config.json").write_text('{"training": {"num_step": 3}}')
    (folder / "junk.npz").write_bytes(b"junk")
    workdir.write_config(tiny_config(**{"evaluation.num_samples": 10}), folder / "run")
    return folder


@pytest.mark.whole
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": (3, 4), "spacing": "trailing"}, "defines its own spacing"),
        ({"classifier": "somewhere", "classifier_form": "mean", "sampler": "ddim"}, "shifts the mean"),
        ({"steps": (3, 4.5, 900), "spacing": "given"}, None),
        ({"classifier": "somewhere", "label": 3}, None),  # which may know classes
    ],
)
def test_training_refuses_what_sampling_would(settings, words, tmp_path, monkeypatch):
    """The errors come before anything is written or compiled; all other configs are accepted."""

    def noting(*_):
        raise DataError("taken")

    monkeypatch.setattr("diffusion_jax.runs.train.log_notes", noting)
    with pytest.raises((UserError, DataError)) as caught:
        train.run(
            tiny_config(**{f"sampling.{setting}": value for setting, value in settings.items()}), tmp_path / "run"
        )
    assert (words or "taken") in str(caught.value) and not (tmp_path / "run").exists()


def test_a_class_by_name_is_checked_once_the_data_names_them(tmp_path):
    classes = {"model.num_classes": 10, "model.label_dropout": 0.1}
    with pytest.raises(UserError, match="sampling.label=.*seven"):
        train.run(tiny_config(**classes, **{"sampling.label": "(3,seven)"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.whole
@pytest.mark.parametrize(("flags", "words"), LAUNCHES, ids=[" ".join(flags) for flags, _ in LAUNCHES])
def test_a_launch_is_refused_in_one_line(flags, words, wrong, tmp_path):
    arguments = [flag.replace("{}", str(wrong)) for flag in flags]
    if arguments[:1] != ["weights"] and not any(flag.startswith("--workdir") for flag in arguments):
        arguments.append(f"--workdir={tmp_path / 'run'}")
    code, _, err = launch(*arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    assert all(word in err for word in words) and len(err) < 600, err
    assert not (tmp_path / "run").exists()


def test_a_rerun_with_the_same_weights_keeps_their_flags(tmp_path):
    stored = tiny_config(init_from="weights.pt", init_flags="preset")
    workdir.write_config(stored, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / "digests.json").write_text("{}")
    flags = ["--pretrained=weights.pt", f"--workdir={tmp_path}"]
    parsed = cli.parse(flags).config
    assert (parsed.init_from, parsed.init_flags) == ("weights.pt", "preset")
    assert cli.parse([*flags, "--pretrained_flags=other"]).config.init_flags == "other"


@pytest.mark.whole
def test_a_closed_output_ends_the_program_quietly(tmp_path):
    arguments = [sys.executable, "main.py", "--config=digits", f"--workdir={tmp_path}", "--mode=status"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written, as `| true` would
        error = process.stderr.read()
    assert process.returncode == 141 and not [line for line in error.splitlines() if "Warning" not in line], error
