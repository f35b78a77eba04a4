"""The command line of a clone.

    python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.group.leaf=value ...]

`diffusion_jax.cli` has the modes and the flags, and the installed command `diffusion-jax` runs the same.
"""

import os
import signal
import sys


def _exit_before_imports(number: int, _) -> None:
    """Ends the program during the imports of `cli`, which then installs handlers of its own."""
    name, code = ("interrupted by Ctrl-C", 130) if number == signal.SIGINT else ("stopped by SIGTERM", 75)
    os.write(2, f"error: {name}; nothing had started\n".encode())
    os._exit(code)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _exit_before_imports)

    try:
        from diffusion_jax import cli
    except ModuleNotFoundError as _error:
        if str(_error.name).startswith("diffusion_jax"):
            raise
        _line = (
            f"{_error.name} is not installed in the environment of {sys.executable}: pip install -r requirements.txt"
        )
        print(f"error: {_line}, or activate an environment that has it", file=sys.stderr)
        sys.exit(2)

    sys.exit(cli.main())
elif __name__ == "__mp_main__":  # a process that reads data: the process that started it handles Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
