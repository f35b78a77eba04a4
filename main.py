"""python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.group.leaf=value ...]

MODE is train, sample, edit (inpainting and more, of images of yours), evaluate (bits per dimension, FID), progressive (rate
and distortion), train_classifier (of noisy images, for guidance) or plan (what training would take on mesh.data times
mesh.fsdp devices, which need not be there; it writes nothing and needs no --workdir). Relaunching the same command
continues the run. For a directory that holds a run, --config may be left out; and with --pretrained=PATH (published
weights, as diffusion_jax.pretrained.load takes them), which any mode then begins with.
"""

import os
import signal


def _end_before_the_run(number: int, _) -> None:
    """For the seconds of imports and flags, in which there is nothing to save."""
    interrupted = number == signal.SIGINT
    os.write(
        2, f"error: {'interrupted by Ctrl-C' if interrupted else 'stopped by SIGTERM'}; nothing had begun\n".encode()
    )
    os._exit(130 if interrupted else 75)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _end_before_the_run)
elif __name__ == "__mp_main__":  # a process that reads data: the one that started it decides what Ctrl-C means
    signal.signal(signal.SIGINT, signal.SIG_IGN)

# ruff: noqa: E402
import difflib
import errno
import functools
import pathlib
import re
import sys
import tempfile
import traceback

from absl import app, flags
from ml_collections import config_flags

from configs import default
from diffusion_jax.distributed import preemption, processes
from diffusion_jax.distributed.launch import join_processes
from diffusion_jax.distributed.termination import EXIT_PEER_LOST
from diffusion_jax.errors import UserError
from diffusion_jax.runs import config_file, devices

_LOSS = "another process of the run was lost; the same command goes on from what was saved"
MODES = ("train", "sample", "edit", "evaluate", "progressive", "train_classifier", "plan")

config_file.register_parsers()
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, samples.")
flags.DEFINE_enum("mode", "train", MODES, "What to do.")
flags.DEFINE_string("pretrained", None, "Published weights to begin with: a folder or file as pretrained.load takes.")
flags.DEFINE_string(
    "pretrained_flags", "", "What these do not say of themselves: a preset's name, OpenAI's flags, JSON."
)
flags.DEFINE_string("coordinator_address", None, "Of several processes: HOST:PORT of the first, the same for all.")
flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the others.", lower_bound=1)
flags.DEFINE_bool("verbose", False, "Also print the options given to the compiler.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Hyperparameters, a file of configs/.", lock_config=True)


def fail(message: str, exit_code: int = 2) -> None:
    """One line on standard error, and the end."""
    if processes.is_multiprocess():
        processes.abort_process(message, exit_code)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags, so that what is wrong with them is one line."""
    devices.quiet()
    # What people write; a config's leaf cannot be named by a word of Python's own. config_flags reads sys.argv itself.
    sys.argv = argv = [arg.replace("--config.sampling.class=", "--config.sampling.label=", 1) for arg in argv]
    path, workdir, weights = (_value(argv, name) for name in ("config", "workdir", "pretrained"))
    if path and not pathlib.Path(path.partition(":")[0]).is_file():
        fail(f"--config={path}: no such file; it must be a Python file, such as {_nearest_config(path)}")
    if workdir:
        _check_workdir(workdir)
    if weights:
        argv = sys.argv = _with_weights(argv, path, workdir, weights)
    elif not path and workdir and _read_config(workdir) is not None:
        stored = f"--config={pathlib.Path(__file__).parent / 'configs' / 'workdir.py'}:{workdir}"
        sys.argv = argv = [argv[0], stored, *argv[1:]]
    elif not path and any(arg.startswith(("--config.", "-config.")) for arg in argv):
        fail(f"--config=configs/NAME.py is needed: {workdir or 'no --workdir'} holds no run whose config could be used")
    try:
        rest = flags.FLAGS(argv)
        config = _CONFIG.value
        if config is not None:
            config_file.check_none(config, default.get_config().to_dict())
        elif path := _value(argv, "config"):
            config_file.load(path)  # raises what is wrong with it
    except UserError as error:
        fail(str(error))
    except Exception as error:  # whatever a config file of the user's own raises, too
        fail(_explain(argv, error))
    if not flags.FLAGS.workdir and flags.FLAGS.mode != "plan":
        fail("--workdir=DIR is needed: where the run keeps its checkpoints, metrics and samples")
    if config is None:
        where = flags.FLAGS.workdir or "no --workdir"
        fail(f"--config=configs/NAME.py is needed: {where} holds no run whose config could be used")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def _nearest_config(path: str) -> str:
    """The config of this project whose name is most like that of `path`."""
    names = [config.name for config in pathlib.Path(default.__file__).parent.glob("*.py") if config.name[0] != "_"]
    name = pathlib.PurePath(path.partition(":")[0]).name
    return f"configs/{next(iter(difflib.get_close_matches(name, sorted(names), n=1)), 'digits.py')}"


def _check_workdir(workdir: str) -> None:
    """Ends the program where no run can be kept: a bucket, a file, or what cannot be written."""
    if "://" in workdir:
        fail(f"--workdir={workdir}: only directories of a mounted file system can hold a run")
    path = pathlib.Path(workdir).expanduser()
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        fail(f"--workdir={workdir}: {existing} is a file; give a directory, which need not exist yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        fail(f"--workdir={workdir}: {existing} cannot be written (permission denied); give another directory")
    if existing != path.absolute():
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".can_be_made", dir=existing))
        except OSError as error:
            fail(
                f"--workdir={workdir}: no directory can be made in {existing} ({error.strerror}); give another directory"
            )


def _with_weights(argv: list[str], path: str | None, workdir: str | None, weights: str) -> list[str]:
    """The arguments with the config of published weights; or, with a config of one's own, with these to begin with."""
    more = _value(argv, "pretrained_flags") or ""
    if workdir and any(pathlib.Path(workdir).expanduser().glob("checkpoints/*/_CHECKPOINT_METADATA")):
        stored = _read_config(workdir) or {}
        if stored.get("init_from") == weights:  # the run that these weights began, launched again
            if path:
                return [*argv, f"--config.init_from={weights}", f"--config.init_flags={more}"]
            config = pathlib.Path(__file__).parent / "configs" / "workdir.py"
            return [argv[0], f"--config={config}:{workdir}", *argv[1:]]
        fail(f"--pretrained={weights} begins a run, and {workdir} holds one; leave it out, or use another --workdir")
    if path:
        return [*argv, f"--config.init_from={weights}", f"--config.init_flags={more}"]
    described = pathlib.Path(__file__).parent / "configs" / "pretrained.py"
    return [argv[0], f"--config={described}:{weights}" + (f"|{more}" if more else ""), *argv[1:]]


def _value(argv: list[str], name: str) -> str | None:
    """The value of a flag (its last, as absl has it) before absl has read any: --name=value or --name value."""
    found = None
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else next(iter(argv[i + 1 :]), None)
    return found


def _read_config(workdir: str) -> dict | None:
    """The config stored in a work directory, None where there is none; one that cannot be read ends the program."""
    from diffusion_jax.runs.workdir import read_config

    try:
        return read_config(pathlib.Path(workdir).expanduser())
    except (UserError, OSError) as error:
        fail(str(error))


def _explain(argv: list[str], error: Exception) -> str:
    """Why the flags could not be read: the config file, a key that it does not have, or a value."""
    path = _value(argv, "config")
    try:
        unknown = config_file.unknown_key(config_file.load(path), argv) if path else None
    except UserError as in_file:
        if pathlib.Path(path.partition(":")[0]).resolve() == config_file.PRETRAINED:
            return f"--pretrained={path.partition(':')[2]}: {in_file}"
        return str(in_file)
    return unknown or re.sub(r"invalid literal for int\(\).*", "must be a whole number", str(error))  # absl's own flags


def check_mode(mode: str, config) -> None:
    """Ends the program where a mode is not for what the config trains: a classifier, an upsampler, or a diffusion model."""
    from diffusion_jax.training import is_classifier, is_upsampler

    classifier = is_classifier(config)
    if mode in ("edit", "evaluate", "progressive") and is_upsampler(config):
        fail(
            f"--mode={mode} is not for a model that enlarges images (data.low_resolution={config.data.low_resolution})"
        )
    if classifier and mode == "train":
        fail("this config trains a classifier (diffusion.loss=classify): use --mode=train_classifier")
    if mode == "plan":
        return
    if classifier and mode != "train_classifier":
        fail(f"--mode={mode} is for diffusion models, and this config is a classifier's (diffusion.loss=classify)")
    if mode == "train_classifier" and not classifier:
        fail("this config trains a diffusion model, not a classifier (diffusion.loss=classify): use --mode=train")


def main(argv: list[str]) -> None:
    """Runs the mode; a user's mistake ends in one line and exit code 2."""
    del argv
    import jax

    from diffusion_jax.data import DataError
    from diffusion_jax.pretrained import PretrainedError
    from diffusion_jax.runs.edit import edit
    from diffusion_jax.runs.measure_likelihood import evaluate, progressive
    from diffusion_jax.runs.plan import plan, virtual_devices
    from diffusion_jax.runs.sample import sample
    from diffusion_jax.runs.train import train
    from diffusion_jax.training.checkpoints import CheckpointError, SaveError, resume_hint

    check_mode(flags.FLAGS.mode, _CONFIG.value)
    runs = {
        "train": train,
        "sample": sample,
        "edit": edit,
        "evaluate": evaluate,
        "progressive": progressive,
        "train_classifier": train,
        "plan": lambda config, directory: plan(config),
    }
    run = runs[flags.FLAGS.mode]
    given = flags.FLAGS
    directory = pathlib.Path(given.workdir or "").expanduser()
    hints = [functools.partial(resume_hint, directory)] if run is train else []
    try:
        if given.mode == "plan":
            devices.start_virtual(virtual_devices(_CONFIG.value))
        else:
            with preemption.exit_on_signals(*hints, only_interrupts=True):
                join_processes(given.coordinator_address, given.num_processes, given.process_id, given.join_timeout)
            devices.start(given.verbose)
        with preemption.exit_on_signals(*hints, only_interrupts=run is train and processes.is_multiprocess()):
            run(_CONFIG.value, directory)
        processes.barrier()
    except preemption.Stopped as error:
        fail(str(error), error.exit_code)
    except UserError as error:
        fail(str(error), error.exit_code)
    except SaveError as error:  # of one process alone, perhaps: the others are in the midst of a step
        (processes.abort_process if processes.is_multiprocess() else fail)(str(error), 1)
    except (DataError, CheckpointError, PretrainedError) as error:
        if processes.is_peer_failure(error):  # a checkpoint that waited for another process
            processes.abort_process(f"{_LOSS} ({error})", EXIT_PEER_LOST)
        fail(str(error))
    except OSError as error:  # a directory that cannot be written is the user's mistake; a full disk, the run's end
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            fail(str(error), 1)
        if given.workdir and str(error.filename).startswith(str(pathlib.Path(given.workdir).expanduser())):
            fail(f"--workdir={given.workdir} cannot be used ({error}); give a directory that can be written")
        fail(str(error))
    except Exception as error:
        if processes.is_peer_failure(error):
            processes.abort_process(f"{_LOSS} ({error})", EXIT_PEER_LOST)
        if processes.is_multiprocess():  # at its end JAX would wait for the others, and they for this process
            traceback.print_exc()
            processes.abort_process(f"process {jax.process_index()} of the run failed, as above", 1)
        raise


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
