"""The record of what made a file."""

import shutil
import subprocess

import pytest

import diffusion_jax
from diffusion_jax import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_records_name_the_commit_of_a_clone_and_whether_its_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=name", "-c", "user.email=name@example.com")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def describe(folder):
        monkeypatch.setattr(provenance, "__file__", str(folder / "diffusion_jax" / "provenance.py"))
        return provenance.code_version.__wrapped__()

    (tmp_path / "code.py").write_text("x = 1")
    git("init", "--quiet")
    git("add", "code.py")
    git("commit", "--quiet", "--message=First")
    version, commit = diffusion_jax.__version__, git("rev-parse", "--short=8", "HEAD")
    assert describe(tmp_path) == f"{version} ({commit})"
    (tmp_path / "code.py").write_text("x = 2")
    assert describe(tmp_path) == f"{version} ({commit}+)"
    assert describe(tmp_path / "site-packages") == version  # installed into a folder of another project's clone
    (tmp_path / ".git" / "HEAD").write_text("broken")
    assert describe(tmp_path) == version
