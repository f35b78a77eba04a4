"""One self-contained page about a run, or about several: report.html.

`write_report(workdir)` writes it; `--mode=report` and the end of training, sampling and evaluation do the same, and
`python -m diffusion_jax.report DIR...` compares runs. The page needs no network: its pictures,
numbers and scripts are inside.
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
from diffusion_jax.storage.downloads import local_path

__all__ = ["NAME", "write_comparison", "write_report"]

NAME = "report.html"


def write_report(workdir: pathlib.Path | str, config: ConfigDict | None = None) -> pathlib.Path:
    """Writes report.html of a work directory, which may be in use, and returns its path.

    config: the run's, if the directory stores none. Raises: OSError if the file cannot be written.
    """
    directory = pathlib.Path(workdir)
    page = run_page(collect(directory, config))
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / NAME, page)
    return directory / NAME


def write_comparison(directories: Sequence[str | os.PathLike], output: pathlib.Path) -> None:
    """Writes a page about several work directories. Raises: UserError for one that does not exist, OSError."""
    paths = [local_path(directory) for directory in directories]
    for path, name in zip(paths, directories, strict=True):
        if not path.is_dir():
            raise UserError(f"{os.fspath(name)} is no directory; name work directories of runs")
    runs = [collect(path) for path in paths]
    write_text(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
