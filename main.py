"""The command line of a clone.

    python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.group.setting=value ...]

`diffusion_jax.cli` has the modes and the flags, and the installed command `diffusion-jax` runs the same.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C prints no traceback; `cli` then handles it

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
