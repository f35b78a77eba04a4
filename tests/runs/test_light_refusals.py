"""`--help` and refusals do not import what only runs need, so that they are fast."""

import json
import os
import subprocess
import sys

from helpers.paths import ROOT

_COMMANDS_OF_FLAGS = [
    ["--help"],
    ["--config=digits"],
    ["--config=digits", "--workdir=run", "--config.training.batch_size=-3"],
    ["--config=digits", "--workdir=run", "--mode=train_classifier"],
]
_COMMANDS_OF_DATA = [
    ["--config=digits", "--workdir=run", "--config.data.dataset=folder", "--config.data.data_dir=nowhere"],
    ["--config=cifar10", "--workdir=run", "--config.data.data_dir=nowhere", "--config.data.download=False"],
]
_HEAVY = ["flax", "optax", "orbax", "grain", "tensorflow", "matplotlib", "sklearn"]
_CODE = """
import json, sys
from diffusion_jax import cli
loaded = []
for command in json.loads(sys.argv[1]):
    try:
        cli.main(command)
    except SystemExit as end:
        loaded.append([end.code, [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(loaded))
"""


def modules_after(commands, names, directory):
    """[exit code, those of `names` that are loaded] after each command, all in one process."""
    arguments = [sys.executable, "-c", _CODE, json.dumps(commands), json.dumps(names)]
    out = subprocess.run(
        arguments, cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def test_help_and_refused_flags_and_data_load_nothing_heavy(tmp_path):
    *of_flags, last = modules_after(
        [*_COMMANDS_OF_FLAGS, *_COMMANDS_OF_DATA], [*_HEAVY, "PIL", "tensorflow_datasets"], tmp_path
    )
    assert [code for code, _ in [*of_flags, last]] == [0] + [2] * (len(of_flags))
    assert all(not names for _, names in of_flags[: len(_COMMANDS_OF_FLAGS)])
    assert set(last[1]) == {"PIL", "tensorflow_datasets"}
