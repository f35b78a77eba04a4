"""Writes report.html, one self-contained page about one or several runs.

`write_report(workdir)` writes the page; `--mode=report` and the end of training, sampling, editing and evaluation call
the same function. `diffusion-jax report DIR...` compares runs. The page contains its pictures, numbers and scripts,
and needs no network.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from diffusion_jax.errors import UserError
from diffusion_jax.files import write_text
from diffusion_jax.report.collect import collect
from diffusion_jax.report.page import comparison_page, run_page
from diffusion_jax.run_dir import RunDir, open_run_dir

NAME = "report.html"


def write_report(workdir: RunDir | str | os.PathLike, config: ConfigDict | None = None) -> pathlib.Path:
    """Writes report.html into a work directory, which may be in use, and returns the path.

    config: used if the directory stores no config. Raises: OSError if the file cannot be written.
    """
    workdir = open_run_dir(workdir, follow_links=True)
    page, path = run_page(collect(workdir, config)), workdir / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    workdir.upload(path)
    return path


def write_comparison(directories: Sequence[str | os.PathLike], output: pathlib.Path) -> None:
    """Writes a page about several work directories. Raises: UserError for a missing directory, OSError."""
    opened = [open_run_dir(directory, read_only=True) for directory in directories]
    for directory in opened:
        if not directory.path.is_dir():
            raise UserError(f"{directory} is not a directory; give work directories of runs")
    runs = [collect(directory) for directory in opened]
    write_text(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
