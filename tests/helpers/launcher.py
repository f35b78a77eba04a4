"""Runs the program in forks of a process that has imported the libraries: a tenth of a second instead of seconds."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
import traceback

from helpers.paths import ROOT

_PRELOAD = ("diffusion_jax.cli", "diffusion_jax.runs.train", "diffusion_jax.runs.edit", "diffusion_jax.runs.evaluate")


@functools.cache
def _server():
    """The context of a fork server, which lives as long as the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *_PRELOAD, __name__])
    return context


def _run(program: str, arguments: tuple[str, ...], out: str, err: str) -> None:
    """The body of the child: one command, its output in files."""
    os.chdir(ROOT)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [program, *arguments]
    code = 1
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def launch(*arguments: str, program: str = "main.py", timeout: float = 120) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `python PROGRAM ARGUMENTS`; a program without .py is a module."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = pathlib.Path(directory, "out"), pathlib.Path(directory, "err")
        out.touch(), err.touch()
        process = _server().Process(target=_run, args=(program, arguments, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, out.read_text(), err.read_text()
