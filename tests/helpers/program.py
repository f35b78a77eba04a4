"""main.py as a person starts it."""

import contextlib
import os
import socket
import subprocess
import sys
import time

from diffusion_jax.config import flatten
from diffusion_jax.runs import evaluate as evaluate_mode
from diffusion_jax.runs import workdir
from helpers.configs import digits_config
from helpers.paths import ROOT

# Trains, and then runs the other modes in the same processes: starting a process takes longer than its steps.
ALL_MODES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from diffusion_jax import cli
from diffusion_jax.runs import evaluate, sample

if __name__ == "__main__":  # the processes that read data import this file, too
    cli.main()
    command = cli.parse(sys.argv[1:])
    for mode in (sample, evaluate):
        mode.run(command.config, command.workdir)
"""


def changed_program(directory, code):
    """Writes a program that runs `code`, for example to replace functions, and then the command line. Returns: the path."""
    path = directory / "changed_program.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom diffusion_jax import cli\n{code}\ncli.main()\n"
    )
    return str(path)


def flags_of(config, directory):
    """The command line of a run, with the settings that differ from the digits."""
    config, base = flatten(workdir.to_dict(config)), flatten(workdir.to_dict(digits_config()))
    changed = {key: value for key, value in config.items() if value != base[key]}
    as_flag = {key: f"({','.join(map(str, v))},)" if isinstance(v, list) else v for key, v in changed.items()}
    return [f"--workdir={directory}", "--config=configs/digits.py", *(f"--config.{k}={v}" for k, v in as_flag.items())]


def start(*arguments, program="main.py", log=None, start_new_session=False, **variables):
    """Starts a program; its output goes to pipes, or is appended to the file `log`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]  # own networks are in helpers
    environment |= {"PYTHONPATH": os.pathsep.join(paths), **variables}
    options = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": start_new_session}
    with contextlib.nullcontext(subprocess.PIPE) if log is None else log.open("a") as output:
        return subprocess.Popen([sys.executable, program, *arguments], stdout=output, stderr=output, **options)


def until(condition, *processes):
    """Waits until a condition holds; fails after five minutes, or when a process ends before."""
    limit = time.monotonic() + 300
    while not condition():
        if time.monotonic() > limit:
            for process in processes:
                process.kill()
        assert all(process.poll() is None for process in processes), [
            p.communicate() for p in processes if p.poll() is not None
        ]
        time.sleep(0.05)


def figure(text):
    """Prints a result of `make faults` for docs/results/reliability.md."""
    print(f"\nFIGURE {text}", flush=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_together(count, *flags, program="main.py"):
    """Starts the processes of one launch. Two processes have two devices each, so that arrays are split within and between
    processes."""
    joined = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
    devices = {"JAX_NUM_CPU_DEVICES": "2"} if count == 2 else {}
    return [start(*flags, *joined, f"--process_id={i}", program=str(program), **devices) for i in range(count)]


def run_together(count, *flags, program="main.py"):
    """Returns what each process of a launch prints. All must end without an error."""
    outputs = [finish(process) for process in start_together(count, *flags, program=program)]
    assert all(code == 0 for code, _, _ in outputs), outputs
    return [out for _, out, _ in outputs]


def evaluate(config, directory):
    """--mode=evaluate, in this process."""
    evaluate_mode.run(config, directory)
