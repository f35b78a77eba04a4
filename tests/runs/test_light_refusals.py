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


def test_help_and_refused_flags_and_data_load_nothing_heavy(tmp_path):
    names = [*_HEAVY, "PIL", "tensorflow_datasets"]
    commands = [*_COMMANDS_OF_FLAGS, *_COMMANDS_OF_DATA]  # all in one process
    arguments = [sys.executable, "-c", _CODE, json.dumps(commands), json.dumps(names)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout
    loaded = json.loads(out.splitlines()[-1])
    assert [code for code, _ in loaded] == [0] + [2] * (len(commands) - 1)
    assert not any(found for _, found in loaded[: len(_COMMANDS_OF_FLAGS)])
    assert set(loaded[-1][1]) == {"PIL", "tensorflow_datasets"}
