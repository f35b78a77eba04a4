"""What cannot be run: one clear line and exit code 2, in seconds."""

import time

import pytest
from test_runs import finish, start, tiny_flags
from test_training import tiny_config

from diffusion_jax.data import DataError
from diffusion_jax.pretrained import PretrainedError
from diffusion_jax.runs.errors import UserError
from diffusion_jax.runs.train import train
from diffusion_jax.training.checkpoints import CheckpointError

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
    ("data.image_size", 7, "7"),
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
    (["--config=configs/digits.py", "--config.training.num_step=3"], "did you mean config.training.num_steps?"),
    (["--config=configs/digits.py", "--config.trainng.num_steps=3"], "did you mean config.training.num_steps?"),
    (["--config=configs/digits.py", "--config.training.num_steps=many"], "invalid literal"),
    (["--config=configs/digits.py", "--config.training.batch_size=0"], "training.batch_size=0"),
    (["--config=configs/digits.py", "--config.mesh.data=3"], "mesh.data=3"),
    (["--config=configs/digits.py", "--config.model.channels=30"], "does not divide a layer of 30 channels"),
    (["--config=configs/nothing.py"], "no such file"),
    (["--config=configs/digits.py", "--mode=trian"], "trian"),
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
    (["--config=configs/digits.py", "--config.evaluation.metrics=('fad',)"], "'fad' is unknown"),
    (["--config=configs/digits.py", "--mode=sample"], "train first"),
    (["--config=configs/digits.py", "--mode=train_classifier"], "not a classifier"),
    (["--config=configs/digits_classifier.py", "--mode=sample"], "classifier"),
    (["--config=configs/digits.py", "--config.data.dataset=folder", "--config.data.data_dir=/nowhere"], "/nowhere"),
    (["--config=configs/digits.py", "--config.init_from=/nowhere"], "/nowhere"),
    (["--config=configs/digits.py", "--workdir=/proc/run"], "/proc/run"),
    (["--config=configs/digits.py", "--workdir=README.md"], "README.md"),
    (["--config=configs/digits.py", "--mode=evaluate"], "train first"),
    (["--config=configs/digits.py", "--process_id=1"], "go together"),
    (["--config=configs/digits.py", "--process_id=x"], "process_id"),
]


@pytest.mark.parametrize(("leaf", "value", "words"), BAD, ids=[f"{leaf}={value}" for leaf, value, _ in BAD])
def test_a_bad_leaf_is_refused(leaf, value, words, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises((UserError, DataError, CheckpointError, PretrainedError, OSError)) as caught:
        train(tiny_config(**{leaf: value}), directory)
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


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """The config was lost, and another one is launched."""
    train(tiny_config(**{"training.num_steps": 2}), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="step 2 .* is of another state: params/"):
        train(tiny_config(**{"model.channels": 16}), tmp_path)
    code, _, err = finish(start(*tiny_flags(tmp_path, **{"model.channels": 16})))
    assert code == 2 and "another state" in err and len(err.strip().splitlines()) == 1, err
