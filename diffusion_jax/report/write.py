"""Writes the page: report.html of a work directory, or a page that compares several."""

from __future__ import annotations

import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from diffusion_jax.errors import UserError
from diffusion_jax.files import write_text
from diffusion_jax.report.collect import collect
from diffusion_jax.report.page import comparison_page, run_page
from diffusion_jax.storage.downloads import local_path

__all__ = ["NAME", "write_comparison", "write_report", "write_report_after"]

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


def write_report_after(
    workdir: pathlib.Path, config: ConfigDict, log: Callable[[str], None], max_seconds: float | None = None
) -> None:
    """`write_report` at the end of a run, which it never fails: an error is one line.

    log: prints a line. max_seconds: gives the page up after this time; None for no limit.
    """
    start, result = time.perf_counter(), queue.SimpleQueue()

    def write():
        try:
            result.put(f"Report, with curves, samples and metrics: {write_report(workdir, config)}")
        except Exception as error:  # the run has done its work, and a page about it is not worth an error
            result.put(f"Note: {workdir / NAME} could not be written: {' '.join(str(error).split())[:200]}")

    threading.Thread(target=write, daemon=True).start()
    try:
        line = result.get(timeout=max_seconds)
    except queue.Empty:
        line = f"Note: {workdir / NAME} was not finished; write it with --mode=report"
    log(f"{line} ({time.perf_counter() - start:.1f} s)")


def write_comparison(directories: Sequence[str | os.PathLike], output: pathlib.Path) -> None:
    """Writes a page about several work directories. Raises: UserError for one that does not exist, OSError."""
    paths = [local_path(directory) for directory in directories]
    for path, name in zip(paths, directories, strict=True):
        if not path.is_dir():
            raise UserError(f"{os.fspath(name)} is no directory; name work directories of runs")
    runs = [collect(path) for path in paths]
    write_text(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
