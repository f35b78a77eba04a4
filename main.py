"""Runs the command line from a clone of the repository.

    python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.group.setting=value ...]

`diffusion_jax.cli` defines the modes and flags; the installed command `diffusion-jax` runs the same program.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports prints no traceback; `cli` handles it later

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
elif __name__ == "__mp_main__":  # a data worker ignores Ctrl-C; its parent process handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
