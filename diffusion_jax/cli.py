"""Trains, samples, edits and measures diffusion models.

    diffusion-jax --config=NAME --workdir=DIR [--mode=MODE] [--config.group.setting=value ...]

Rerun the same command to resume the run. Omit --config if DIR already holds a run, or with --pretrained=PATH, which starts
any mode from the weights at PATH (see `diffusion_jax.pretrained.load`).

Further commands, each with --help: diffusion-jax weights (describes, converts and publishes weights), diffusion-jax compare
(measures samples against a reference set), and diffusion-jax report (a page about one run or several runs).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib
import inspect
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

from diffusion_jax import config as configs
from diffusion_jax.distributed import devices, processes, signals
from diffusion_jax.errors import (
    ConfigError,
    DiffusionJaxError,
    SaveError,
    UserError,
    as_user_error,
    closest_names,
    describe_exception,
    find_user_frame,
    print_text,
    wrap,
)
from diffusion_jax.files import with_urls
from diffusion_jax.run_dir import BucketRunDir, RunDir, committed_steps, open_run_dir
from diffusion_jax.storage.downloads import local_path
from diffusion_jax.storage.locks import LockHeldError

MODES = {
    "train": "train a diffusion model, or resume its training",
    "sample": "draw samples",
    "edit": "edit images: inpainting and more",
    "evaluate": "measure bits per dimension, and metrics of samples such as the FID",
    "train_classifier": "train a classifier of noisy images, for guidance",
    "status": "print progress, speed, checkpoint, losses and goodput of a work directory; reads only",
    "report": "write report.html: curves, samples, metrics and events of a work directory on one page",
    "plan": "estimate training without the devices: mesh.data times mesh.fsdp devices, or a TPU topology; writes nothing",
}
COMMANDS = {"weights": "pretrained", "compare": "evaluation", "report": "report"}  # each runs __main__.py of a package
_DEBUG = "--debug"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # these are failed runs; other file errors are bad input


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line. workdir: None only for the mode "plan"."""

    config: ConfigDict
    mode: str
    workdir: RunDir | None
    flags: argparse.Namespace


class _Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs and the indented lines of a module's docstring at the width of the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrap(re.sub(r"(?<=[^\n])\n(?=\S)", " ", text), width)


class Parser(argparse.ArgumentParser):
    """An argument parser with a module's docstring as its description; an invalid argument raises UserError."""

    def __init__(self, prog: str, description: str | None, **options):
        super().__init__(prog=prog, description=description, formatter_class=_Formatter, allow_abbrev=False, **options)
        self.add_argument(_DEBUG, action="store_true", help="print the traceback of an error before its line")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser of all flags except the `--config.group.setting` overrides.

    arguments: the command-line arguments; if they set --config.model.kind=module:function, the help describes that network.
    """
    modes = "\n".join(f"  {name:17} {description}" for name, description in MODES.items())
    experiments = f"  {', '.join(configs.experiment_names())}"
    parser = Parser(
        "diffusion-jax",
        f"{__doc__}\nModes:\n{modes}\n\nExperiments (--config), some with a variant such as imagenet_adm:128:\n{experiments}",
        epilog="--config.group.setting=VALUE overrides a setting; docs/reference/configuration.md lists all settings."
        + _describe_network(arguments),
    )
    add = parser.add_argument
    add("--config", metavar="NAME", help="one of the listed experiments, or a Python file with get_config()")
    add("--workdir", metavar="DIR", help="directory of the run: checkpoints, metrics, samples")
    add("--mode", default="train", choices=MODES, metavar="MODE", help="one of the listed modes (default: train)")
    add("--pretrained", metavar="PATH", help="weights to start from, as for pretrained.load")
    text = "settings missing from the weights' file: a preset, OpenAI's flags, or JSON"
    add("--pretrained_flags", metavar="FLAGS", default="", help=text)
    add("--trust_network", action="store_true", help="import the functions and open the URLs that a run names")
    add("--follow_links", action="store_true", help="write through links that lead out of the work directory")
    for name, kind, metavar, text in (
        ("coordinator_address", str, "HOST:PORT", "address of process 0, the same for all processes"),
        ("num_processes", int, "N", "number of processes in the run"),
        ("process_id", int, "I", "number of this process, from 0"),
    ):
        add(f"--{name}", default=os.environ.get(f"JAX_{name.upper()}"), type=kind, metavar=metavar, help=text)
    add("--join_timeout", type=int, metavar="SECONDS", default=300, help="how long to wait for the other processes")
    return parser


def _describe_network(arguments: Sequence[str]) -> str:
    """Returns the docstring and the options of the network in --config.model.kind=module:function; "" for other kinds."""
    kinds = [text.partition("=")[2] for text in arguments if text.startswith("--config.model.kind=")]
    if not kinds or ":" not in kinds[-1]:
        return ""
    from diffusion_jax import models  # imported here, so that plain help loads nothing heavy

    try:
        function = models.import_network(kinds[-1])
    except ValueError as error:
        raise UserError(str(error)) from None
    options = [
        f"  --config.model.{'' if f'model.{name}' in configs.SETTINGS else 'options.'}{str(value).replace(' = ', '=')}"
        for name, value in list(inspect.signature(function).parameters.items())[1:]
        if name != "rngs"
    ]
    return "\n".join([f"\n\nThe network {kinds[-1]}:", inspect.getdoc(function) or "", *options])


def parse(arguments: Sequence[str]) -> Command:
    """Parses the command-line arguments, without the program name. Raises: UserError for an invalid command line."""
    parser = make_parser(arguments if "--help" in arguments or "-h" in arguments else ())
    flags, rest = parser.parse_known_args(list(arguments))
    overrides = _read_overrides(rest, [f"--{name}" for name in vars(flags)])
    try:
        config = configs.experiment(flags.config) if flags.config else None
    except ConfigError as error:
        raise ConfigError(f"--config={error}") from None
    workdir = _open_workdir(flags.workdir, flags.mode, flags.follow_links) if flags.workdir else None
    starts = config and (config.init_from or flags.mode in ("train", "train_classifier", "plan"))
    if workdir and not (starts or flags.pretrained or overrides.get("init_from") or workdir.path.exists()):
        needs = f"{'without --config=NAME, ' * (config is None)}--mode={flags.mode} reads the directory of a run"
        raise UserError(f"--workdir={workdir}: no such directory; {needs}")
    if flags.pretrained:
        trusted: bool | Mapping[str, str] = flags.trust_network or overrides
        config, init = _config_with_weights(config, workdir, flags.pretrained, flags.pretrained_flags, trusted)
        overrides = init | overrides
    elif config is None and workdir is not None:
        from diffusion_jax.runs.workdir import load_config

        config = load_config(workdir)
    reads_functions = not (flags.config or flags.trust_network) and flags.mode not in ("status", "report")
    found = configs.untrusted_values(config) if config is not None and reads_functions else {}
    unread = {"data.data_dir", "evaluation.data_dir", "evaluation.inception"} if flags.mode == "sample" else set()
    if workdir and not flags.pretrained and committed_steps(workdir / "checkpoints"):
        unread.add("init_from")
    if names := sorted(found.keys() - overrides.keys() - unread):
        values = ", ".join(f"{found[name]} ({name})" for name in names)
        allowed = " ".join(f"--config.{name}={found[name]}" for name in names)
        raise UserError(
            f"{flags.pretrained or workdir} holds a run that imports or opens {values}; to allow it, add {allowed}, "
            "--config=... or --trust_network"
        )
    if config is None:
        reason = f"{workdir} holds no run" if workdir else "without --workdir=DIR there is no run"
        raise UserError(f"--config=NAME is needed: {reason} whose config could be used")
    config = configs.override(config, overrides)
    if flags.mode == "edit" and "sampling.num_samples" in overrides:
        count = overrides["sampling.num_samples"]
        raise UserError(
            f"sampling.num_samples={count} has no effect on --mode=edit; use --config.editing.num_samples={count}"
        )
    if workdir is None and flags.mode != "plan":
        raise UserError("--workdir=DIR is needed: the directory of checkpoints, metrics and samples")
    return Command(config, flags.mode, workdir, flags)


def _read_overrides(arguments: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Parses --config.group.setting=text into {"group.setting": text}. Raises: UserError for any other argument."""
    overrides, problem = {}, ""
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("-"):
            problem = f"unexpected argument {argument!r}; flags are written --name=value"
        elif not flag.startswith("--config."):
            near = closest_names(flag, known)
            problem = f"unknown flag {flag}; {f'did you mean {near[0]}?' if near else '--help lists all flags'}"
        elif not equals:
            problem = f"{flag} needs a value: {flag}=VALUE"
        if problem:
            raise UserError(problem)
        overrides[flag.removeprefix("--config.")] = text
    return overrides


def _open_workdir(workdir: str, mode: str, follow_links: bool) -> RunDir:
    """Opens the work directory. Raises: UserError if the path cannot be a work directory."""
    # The mode report allows links, because a report leaves out the files behind them.
    opened = open_run_dir(workdir, mode == "status", follow_links=follow_links or mode in ("plan", "report"))
    if isinstance(opened, BucketRunDir):
        return opened
    path = opened.path
    existing, problem = next(parent for parent in (path, *path.absolute().parents) if parent.exists()), ""
    if mode in ("status", "report") and not path.exists():
        problem = f"no such directory; --mode={mode} reads the directory of a run"
    elif not existing.is_dir():
        problem = f"{existing} is a file; give a directory (a new one is made)"
    elif existing != path.absolute() and not os.access(existing, os.W_OK):
        problem = f"no directory can be made in {existing}; give another directory"
    if problem:
        raise UserError(f"--workdir={workdir}: {problem}")
    return opened


def _config_with_weights(
    config: ConfigDict | None, workdir: RunDir | None, weights: str, flags: str, trusted: bool | Mapping[str, str]
) -> tuple[ConfigDict, dict[str, str]]:
    """Returns `config`, by default the config of the weights, and the overrides that start training from the weights.

    trusted: {setting: function} to import in place of the functions that the weights name; True imports the named functions.
    """
    saved = workdir and committed_steps(workdir / "checkpoints")
    with as_user_error(f"--pretrained={weights}", DiffusionJaxError, OSError):
        _ = saved or local_path(weights)  # downloads the weights before an import that takes seconds
    from diffusion_jax.runs.workdir import config_from_weights, load_config

    if workdir is not None and saved:
        stored = load_config(workdir)  # a relaunch finds the config of the first launch
        if stored is None or stored.init_from != weights:
            raise UserError(
                f"--pretrained={weights} starts a run, but {workdir} holds a run; omit --pretrained, or use another --workdir"
            )
        config, flags = config or stored, flags or stored.init_flags
    with as_user_error(f"--pretrained={weights}", DiffusionJaxError, OSError):
        config = config or config_from_weights(weights, flags, trusted)
    return config, {"init_from": weights, "init_flags": flags}


def check_mode(mode: str, config: ConfigDict) -> None:
    """Raises UserError if the mode does not suit the network: a classifier, an upsampler or a diffusion model."""
    kind, other = f"a diffusion model (diffusion.loss={config.diffusion.loss})", ""
    if configs.is_classifier(config):
        kind = "a classifier (diffusion.loss=classify)"
        other = "" if mode in ("train_classifier", "plan", "status", "report") else "train_classifier"
    elif mode == "train_classifier":
        other = "train"
    elif configs.is_upsampler(config):
        kind = f"a model that enlarges images (data.low_resolution={config.data.low_resolution})"
        other = "sample" if mode in ("edit", "evaluate") else ""
    if other:
        raise UserError(f"--mode={mode} is not for {kind}, which this config describes; use --mode={other}")


def run(command: Command) -> None:
    """Runs the mode of a command."""
    config, mode, workdir, flags = command.config, command.mode, command.workdir, command.flags
    check_mode(mode, config)
    if workdir is None or mode == "plan":
        from diffusion_jax.runs import plan

        devices.start_virtual(max(1, config.mesh.data) * max(1, config.mesh.fsdp))  # -1 (all devices) counts as 1
        return plan.run(config)
    if mode == "status":
        from diffusion_jax.runs import status

        return print_text(status.report(config, workdir), lines=True)
    if mode == "report":
        from diffusion_jax.report import write_report

        path = write_report(workdir, config)
        processes.log(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
        return
    trains = mode in ("train", "train_classifier")
    processes.join_processes(flags.coordinator_address, flags.num_processes, flags.process_id, flags.join_timeout)
    if not trains:
        signals.HANDLER.install()  # JAX's preemption service, used only by training, has replaced the SIGTERM handler
    devices.start()
    if trains and not (workdir / "checkpoints").exists():  # a finished run needs no data
        from diffusion_jax import data

        data.check_location(config.data)
    # This import takes almost a second, so the flags are checked first.
    function = importlib.import_module(f"diffusion_jax.runs.{'train' if trains else mode}").run
    if trains:
        from diffusion_jax.training.checkpoints import resume_hint

        signals.HANDLER.resume_hint = functools.partial(resume_hint, workdir)
    function(config, workdir)
    _write_report(config, workdir)
    processes.barrier("end")  # process 0 may write its last files for longer than JAX waits at exit


def _write_report(config: ConfigDict, workdir: RunDir) -> None:
    """Writes the report when a mode ends; an error is logged as one line, because the mode itself succeeded."""
    import jax

    from diffusion_jax.report import write_report

    if jax.process_index() != 0:
        return
    start = time.perf_counter()
    try:
        line = f"Report, with curves, samples and metrics: {write_report(workdir, config)}"
    except Exception as error:
        line = f"Note: {workdir / 'report.html'} could not be written: {' '.join(str(error).split())[:200]}"
    processes.log(f"{line} ({time.perf_counter() - start:.1f} s)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line, by default `sys.argv`. An error ends the program with one line and an exit code.

    Exit codes: 0 for success, 2 for bad input, 1 for a failed run, 130 after Ctrl-C, 75 after SIGTERM, 141 after a broken
    output pipe, and `EXIT_PEER_LOST` if another process was lost.
    """
    if arguments is None:
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # data workers do not import modules of the current directory
        arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"diffusion_jax.{COMMANDS[arguments[0]]}.__main__").main(arguments[1:])
    with program(arguments):
        command = parse(arguments)
        try:
            run(command)
        except OSError as error:
            raise _explain_os_error(error, command.workdir) from error


@contextlib.contextmanager
def program(arguments: Sequence[str] | None, bad_input: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Runs the block as a program: an error, a signal or a broken output pipe ends it with one line and an exit code.

    arguments: the command-line arguments, by default `sys.argv`; --debug prints the traceback of an error before the line.
    bad_input: further exception types that end the program with one line, as this package's errors, errors in a user's
    functions, OSError and missing packages always do. Any other exception is raised again.
    """
    signals.HANDLER.install()
    sys.excepthook = _print_traceback
    warnings.showwarning = lambda message, *_: print_text(f"Warning: {message}", sys.stderr)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the shell closed stdout
    devices.silence_libraries()
    try:
        with processes.exit_if_output_is_closed():
            yield
    except signals.StoppedBySignal as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        _fail_with(error, bad_input, _DEBUG in (sys.argv[1:] if arguments is None else arguments))


def _print_traceback(*error: Any) -> None:
    """Prints a traceback, given the arguments of `sys.excepthook`."""
    print_text("".join(traceback.format_exception(*error)).rstrip(), sys.stderr, lines=True)


def _explain_os_error(error: OSError, workdir: RunDir | None) -> Exception:
    """Returns the error to report: UserError for an unwritable directory (bad input) or a bucket (failed run), or `error`."""
    if isinstance(error, LockHeldError) or processes.is_peer_failure(error):
        return error
    if isinstance(workdir, BucketRunDir):  # a failed run: the bucket worked when the program started
        return UserError(str(error), exit_code=1)
    if workdir is not None and error.errno not in _FULL_DISK and str(error.filename).startswith(str(workdir)):
        return UserError(f"--workdir={workdir} cannot be used ({error}); give a directory that can be written")
    return error


def _fail_with(error: Exception, bad_input: tuple[type[Exception], ...], debug: bool) -> NoReturn:
    """Ends the program with the error's exit code; an unexpected error is raised again."""
    if not isinstance(error, UserError | SaveError) and processes.is_peer_failure(error):
        message = "another process of the run was lost; rerun the same command to resume from the last checkpoint"
        processes.abort_process(f"{message} ({error})", processes.EXIT_PEER_LOST)
    if (explained := _explain(error, bad_input)) is not None:
        message, exit_code = explained
        if debug:
            _print_traceback(type(error), error, error.__traceback__)
        elif any(each is not None and find_user_frame(each) for each in (error, error.__cause__)):
            message += f"; {_DEBUG} prints the traceback"
        _fail(message, exit_code)
    if processes.is_multiprocess():  # at a normal exit the processes would wait for each other
        import jax

        _print_traceback(type(error), error, error.__traceback__)
        processes.abort_process(f"process {jax.process_index()} of the run failed, as above", 1)
    raise error


def _explain(error: Exception, bad_input: tuple[type[Exception], ...]) -> tuple[str, int] | None:
    """Returns the line and the exit code for an error; None for an unexpected error."""
    if isinstance(error, DiffusionJaxError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return describe_exception(error), 1 if error.errno in _FULL_DISK else 2
    if find_user_frame(error) or isinstance(error, bad_input):
        return describe_exception(error), 2
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("diffusion_jax"):
        return f"{error.name} is not installed: pip install -r requirements.txt, or pip install '.[train,tfds]'", 2
    return None


def _fail(message: str, exit_code: int) -> NoReturn:
    """Writes one line to standard error and ends the program."""
    if processes.is_multiprocess():
        processes.abort_process(message, exit_code)
    print_text(f"error: {with_urls(' '.join(message.split()))}", sys.stderr)
    sys.exit(exit_code)
