"""The files of docs/recipes: their syntax, their commands, and the exit codes after which they start the program again."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from diffusion_jax import cli, config
from helpers.paths import ROOT

FOLDER = ROOT / "docs" / "recipes"
WITH_COMMANDS = [path for path in sorted(FOLDER.iterdir()) if path.name not in ("Dockerfile", "tpu_pod.sh")]
RESUMABLE = (69, 75, 134, 137, 143)  # docs/guides/resume_and_faults.md
RUN = "gs://BUCKET/cifar10"

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def commands(path):
    """The command lines of a recipe: lines of a shell, or lists of words in YAML."""
    text = re.sub(r"\\\n\s*|\n\s*- (?=--)", " ", path.read_text())
    variables = dict(re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE))
    lines = re.findall(r"^[^#\n]*?(?:\S*/|\s)(diffusion-jax\s.*)", text, re.MULTILINE)
    return [[re.sub(r"\$(\w+)", lambda m: variables[m[1]], word) for word in shlex.split(line)] for line in lines]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_the_command_line_parses_the_commands(path):
    assert commands(path)
    for _, *arguments in commands(path):
        flags, leaves = cli.make_parser().parse_known_args(arguments)
        overrides = dict(leaf.removeprefix("--config.").split("=", 1) for leaf in leaves)
        config.override(config.experiment(flags.config), overrides)
        assert re.fullmatch(r"(gs|s3)://BUCKET/\w+", flags.workdir)


def test_the_lists_of_exit_codes_agree():
    job = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    sky = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert set(sky) == {*RESUMABLE} - {137}
    guide = (ROOT / "docs" / "guides" / "resume_and_faults.md").read_text()
    assert "|".join(map(str, RESUMABLE)) in guide


class Shell:
    """Runs a recipe with replaced commands, whose calls are written to a file."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.replace("sleep", "")

    def replace(self, command, script):
        path = self.bin / command
        path.write_text(f'#!/bin/bash\necho "{command} $*" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def answer(self, command, lines):
        """Makes a command end with the exit codes, one for each call."""
        (self.folder / f"{command}.codes").write_text("".join(f"{line}\n" for line in lines))
        codes = self.folder / f"{command}.codes"
        self.replace(command, f"read -r code < {codes}; sed -i 1d {codes}; exit ${{code:-99}}")

    def run(self, recipe, **variables):
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOSTNAME": "host", **variables}
        done = subprocess.run(
            ["bash", str(FOLDER / recipe)], env=environment, cwd=self.folder, capture_output=True, timeout=60
        )
        return done.returncode

    def calls(self, start):
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


@needs_bash
@pytest.mark.parametrize("last", [0, 1])
def test_a_host_of_a_tpu_pod_is_relaunched_until_another_exit_code(shell, last):
    shell.replace("gcloud", "cat > /dev/null")
    shell.answer("docker", [*RESUMABLE, last])
    assert shell.run("tpu_host.sh") == last
    assert len(shell.calls("docker run")) == len(RESUMABLE) + 1
    assert len(shell.calls(f"gcloud storage cp - {RUN}.failed")) == (last != 0)


@needs_bash
@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_slurm_job_is_requeued_after_resumable_exit_codes(shell, code):
    shell.answer("srun", [code])
    shell.replace("scontrol", "")
    assert shell.run("slurm.sbatch", SLURM_JOB_ID="7") == code
    assert shell.calls("scontrol") == (["scontrol requeue 7"] if code in RESUMABLE else [])
