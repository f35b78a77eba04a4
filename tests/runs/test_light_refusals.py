"""`--help` and refusals are fast, because libraries that only runs need are not imported."""

import json
import os
import subprocess
import sys

from helpers.paths import ROOT

_COMMANDS = [
    ["--help"],
    ["--config=digits"],
    ["--config=digits", "--workdir=run", "--config.training.batch_size=-3"],
    ["--config=digits", "--workdir=run", "--mode=train_classifier"],
    ["--config=digits", "--workdir=run", "--pretrained=hf://no-name"],
    ["--workdir=run", "--mode=sample", "--pretrained=hf://no-name"],
    ["--workdir=run", "--mode=sample"],
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


def test_help_and_refusals_load_nothing_heavy(tmp_path):
    """All commands run in one process; the last command looks for a data set."""
    arguments = [sys.executable, "-c", _CODE, json.dumps(_COMMANDS), json.dumps([*_HEAVY, "tensorflow_datasets"])]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == [[0, []], *[[2, []]] * 6, [2, ["tensorflow_datasets"]]]
