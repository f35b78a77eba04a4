"""python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.group.leaf=value ...]

MODE is train, sample, edit (inpainting and more, of images of yours), evaluate (bits per dimension, FID), progressive (rate
and distortion), train_classifier (of noisy images, for guidance) or plan (what training would take on mesh.data times
mesh.fsdp devices, which need not be there; it writes nothing and needs no --workdir). Relaunching the same command
continues the run. For a directory that holds a run, --config may be left out; and with --pretrained=PATH (published
weights, as diffusion_jax.pretrained.load takes them), which any mode then begins with.
"""

import difflib
import errno
import os
import pathlib
import runpy
import signal
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from diffusion_jax.runs import devices, watch

_LOSS = "another process of the run was lost; the same command goes on from what was saved"
MODES = ("train", "sample", "edit", "evaluate", "progressive", "train_classifier", "plan")

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
    if watch.several():
        watch.leave(message, exit_code)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags, so that what is wrong with them is one line."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(watch.STOPPED))  # until there is something to save
    # What people write; a config's leaf cannot be named by a word of Python's own. config_flags reads sys.argv itself.
    sys.argv = argv = [arg.replace("--config.sampling.class=", "--config.sampling.label=", 1) for arg in argv]
    path, workdir, weights = (_value(argv, name) for name in ("config", "workdir", "pretrained"))
    if path and not pathlib.Path(path.partition(":")[0]).is_file():
        fail(f"--config={path}: no such file")
    if workdir and "://" in workdir:
        fail(f"--workdir={workdir}: only directories of a mounted file system can hold a run")
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
            config.to_dict()  # a file that could not be loaded raises only when it is read
    except (KeyError, AttributeError) as error:
        fail(_unknown_key(argv) or f"cannot read the config: {error}")
    except (flags.Error, OSError, ValueError, ImportError, SyntaxError, TypeError) as error:
        fail(str(error))
    except Exception as error:  # PretrainedError, whose import would take seconds from every launch
        if type(error).__name__ != "PretrainedError":
            raise
        fail(str(error))
    if flags.FLAGS.workdir is None and flags.FLAGS.mode != "plan":
        fail("--workdir=DIR is needed: where the run keeps its checkpoints, metrics and samples")
    if config is None:
        where = flags.FLAGS.workdir or "no --workdir"
        fail(f"--config=configs/NAME.py is needed: {where} holds no run whose config could be used")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


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
    from diffusion_jax.runs.errors import UserError
    from diffusion_jax.runs.workdir import read_config

    try:
        return read_config(pathlib.Path(workdir).expanduser())
    except (UserError, OSError) as error:
        fail(str(error))


def _unknown_key(argv: list[str]) -> str | None:
    """What is wrong with the first override whose key the config does not have."""
    from diffusion_jax.runs.workdir import flatten, to_dict

    path, _, argument = (_value(argv, "config") or "").partition(":")
    get_config = runpy.run_path(path)["get_config"]
    known = flatten(to_dict(get_config(argument) if argument else get_config()))
    for arg in argv:
        key = arg.lstrip("-").split("=")[0].removeprefix("config.")
        if arg.startswith(("--config.", "-config.")) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            return f"unknown config key config.{key}; did you mean config.{near[0]}?"
    return None


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
    devices.quiet()
    import jax

    from diffusion_jax.data import DataError
    from diffusion_jax.pretrained import PretrainedError
    from diffusion_jax.runs.edit import edit
    from diffusion_jax.runs.errors import UserError
    from diffusion_jax.runs.evaluate import evaluate, progressive
    from diffusion_jax.runs.generate import sample
    from diffusion_jax.runs.plan import plan, virtual_devices
    from diffusion_jax.runs.train import train
    from diffusion_jax.training.checkpoints import CheckpointError, SaveError

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
    try:
        if given.mode == "plan":
            devices.start_virtual(virtual_devices(_CONFIG.value))
        else:
            devices.join(given.coordinator_address, given.num_processes, given.process_id, given.join_timeout)
            devices.start(given.verbose)
        with watch.stopping_at_once(training=run is train):
            run(_CONFIG.value, pathlib.Path(given.workdir or "").expanduser())
        watch.meet()
    except watch.Stopped as error:
        fail(str(error), watch.STOPPED)
    except UserError as error:
        fail(str(error), error.exit_code)
    except SaveError as error:  # of one process alone, perhaps: the others are in the midst of a step
        (watch.leave if watch.several() else fail)(str(error), 1)
    except (DataError, CheckpointError, PretrainedError) as error:
        if watch.is_loss(error):  # a checkpoint that waited for another process
            watch.leave(f"{_LOSS} ({error})", watch.LOST)
        fail(str(error))
    except (
        OSError
    ) as error:  # a directory that cannot be written is the user's mistake; a disk that is full, the run's end
        fail(str(error), 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from what it had saved", 130)
    except Exception as error:
        if watch.is_loss(error):
            watch.leave(f"{_LOSS} ({error})", watch.LOST)
        if watch.several():  # at its end JAX would wait for the others, and they for this process
            traceback.print_exc()
            watch.leave(f"process {jax.process_index()} of the run failed, as above", 1)
        raise


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
