"""The files in docs/recipes: syntax, commands, and the exit codes after which a recipe restarts the program."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from diffusion_jax import cli, config
from helpers.paths import ROOT

FOLDER = ROOT / "docs" / "recipes"
WITH_COMMANDS = [path for path in sorted(FOLDER.iterdir()) if path.name not in ("Dockerfile", "tpu_pod.sh")]
RESUMABLE = (69, 75, 134, 137, 143)  # docs/guides/resume_and_faults.md
RUN = "gs://BUCKET/cifar10"

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def commands(path):
    """A recipe's command lines: shell lines, or lists of words in YAML."""
    text = re.sub(r"\\\n\s*|\n\s*- (?=--)", " ", path.read_text())
    variables = dict(re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE))
    lines = re.findall(r"^[^#\n]*?(?:\S*/|\s)(diffusion-jax\s.*)", text, re.MULTILINE)
    return [[re.sub(r"\$(\w+)", lambda m: variables[m[1]], word) for word in shlex.split(line)] for line in lines]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_the_command_line_parses_the_commands(path):
    assert commands(path)
    for _, *arguments in commands(path):
        flags, settings = cli.make_parser().parse_known_args(arguments)
        overrides = dict(setting.removeprefix("--config.").split("=", 1) for setting in settings)
        config.override(config.experiment(flags.config), overrides)
        assert re.fullmatch(r"(gs|s3)://BUCKET/\w+", flags.workdir)


def run_recipe(folder, recipe, exit_codes, **variables):
    """(a recipe's exit code, calls of replaced commands). exit_codes: {command: a code for each call, then 0}."""
    for command, numbers in exit_codes.items():
        path, left = folder / command, folder / f"{command}.left"
        left.write_text("".join(f"{number}\n" for number in numbers))
        script = f"read -r code < {left}; sed -i 1d {left}; exit ${{code:-0}}"
        path.write_text(f'#!/bin/bash\necho "{command} $*" >> {folder}/calls\n{script}\n')
        path.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOSTNAME": "host", **variables}
    command = ["bash", str(FOLDER / recipe)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, timeout=60)
    return done.returncode, (folder / "calls").read_text().splitlines()


@needs_bash
@pytest.mark.parametrize("last", [0, 1])
def test_a_host_of_a_tpu_pod_is_relaunched_until_another_exit_code(tmp_path, last):
    exit_codes = {"docker": [*RESUMABLE, last], "gcloud": [], "sleep": []}
    code, calls = run_recipe(tmp_path, "tpu_host.sh", exit_codes)
    assert code == last and sum(call.startswith("docker run") for call in calls) == len(RESUMABLE) + 1
    assert (f"gcloud storage cp - {RUN}.failed" in calls) == (last != 0)


@needs_bash
@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_slurm_job_is_requeued_after_resumable_exit_codes(tmp_path, code):
    ended, calls = run_recipe(tmp_path, "slurm.sbatch", {"srun": [code], "scontrol": []}, SLURM_JOB_ID="7")
    assert ended == code and ("scontrol requeue 7" in calls) == (code in RESUMABLE)
