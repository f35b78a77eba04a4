"""python -m diffusion_jax.pretrained inspect PATH [--flags=FLAGS] [--raw]
python -m diffusion_jax.pretrained convert PATH TO [--flags=FLAGS] [--raw]

inspect prints what the weights at PATH are. convert writes them as TO: a file TO.safetensors of this project's, or else a
folder of diffusers'. FLAGS: a preset's name, OpenAI's flags, or JSON; --raw: not the moving average.
"""

import argparse
import math
import sys

import absl.logging

from diffusion_jax import pretrained
from diffusion_jax.models import fields_of
from diffusion_jax.pretrained import layers


def main(argv: list[str] | None = None) -> None:
    """The command line; what is wrong with PATH is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.pretrained", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.error = _fail  # without the usage, which would hide the line that says what is wrong
    parser.add_argument("command", choices=("inspect", "convert"))
    parser.add_argument("path", help="what to read, as pretrained.load")
    parser.add_argument("to", nargs="?", help="what convert writes")
    parser.add_argument("--flags", help="what the file does not say of itself")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    given = parser.parse_args(argv)
    if (given.command == "convert") != (given.to is not None):
        _fail("convert needs PATH and TO, and inspect PATH alone")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks on how it reads
    try:
        net = pretrained.load(given.path, pretrained.read_flags(given.flags), not given.raw)
        print(table(net))
        if given.to is None:
            return
        (pretrained.save_safetensors if given.to.endswith(".safetensors") else pretrained.save_diffusers)(net, given.to)
        print(f"Written: {given.to}")
    except (pretrained.PretrainedError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _fail(message: str) -> None:
    """Ends the program with one line about its arguments."""
    print(f"error: {message}; see python -m diffusion_jax.pretrained --help", file=sys.stderr)
    sys.exit(2)


def table(net: pretrained.Description) -> str:
    """All that is known of weights, a line each."""
    shapes = layers.shapes_of(net.model, net.image_size, net.in_channels)
    height, width = net.image_size
    rows = {
        "family": net.family,
        "network": type(net.model).__name__,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,} in {len(shapes)} tensors",
        "images": f"{height}x{width}, {net.channels} channels",
        "enlarges": f"images {net.low_resolution} pixels high" if net.low_resolution else None,
        "classes": net.num_classes or None,
        "prediction": net.prediction,
        "variance": net.variance,
        "clip": net.clip,
        "schedule": "a table of betas" if net.diffusion is None else net.diffusion["schedule"],
        "timesteps": f"{net.schedule.num_timesteps}, to the network 0 ... {net.schedule.timesteps[-1]:g}",
    }
    fields = {f"model.{name}": value for name, value in fields_of(net.model).items()}
    shown = {name: value for name, value in (rows | fields).items() if value is not None}
    wide = max(map(len, shown))
    return "\n".join(f"{name:{wide}}  {value}" for name, value in shown.items())


if __name__ == "__main__":
    main()
