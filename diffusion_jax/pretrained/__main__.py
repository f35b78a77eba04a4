"""Describes and converts pretrained weights.

    diffusion-jax weights list
    diffusion-jax weights inspect PATH [--flags=FLAGS] [--raw]
    diffusion-jax weights convert PATH TO [--flags=FLAGS] [--raw]
    diffusion-jax weights publish PATH TO --license=NAME --data=TEXT [--flags=FLAGS] [--raw]

list prints the published weights that are known to load, with size, license and page. inspect prints a description of the
weights at PATH, also hf://OWNER/NAME[/FILE][@REVISION]. convert writes the weights to TO: a file of this package if TO ends
in .safetensors, else a diffusers folder. convert also writes a model card, README.md in the folder or NAME.md beside the
file, with the run's data, settings and metrics, unless this file exists. publish writes both formats (only this package's for
a network that diffusers does not have), the model card and a run's newest picture of samples, if any, to TO: an empty folder,
gs:// or s3://BUCKET/PREFIX, or hf://OWNER/NAME with a token. FLAGS: the name of a preset, OpenAI's flags, or JSON; --raw: use
the raw weights, not the moving average.
"""

import pathlib

from diffusion_jax import pretrained
from diffusion_jax.cli import Parser, program
from diffusion_jax.errors import print_text
from diffusion_jax.files import write_text
from diffusion_jax.storage.downloads import local_path

_COMMANDS = {"list": 0, "inspect": 1, "convert": 2, "publish": 2}  # the number of paths


def make_parser() -> Parser:
    """Builds the argument parser."""
    parser = Parser("diffusion-jax weights", __doc__)
    parser.add_argument("command", choices=_COMMANDS, help="convert and publish also write the weights")
    parser.add_argument("path", nargs="?", help="the weights to read, as for pretrained.load")
    parser.add_argument("to", nargs="?", help="the file or folder to write")
    parser.add_argument(
        "--license", default="", help="for publish: the weights' license, by its name on the Hub, such as mit"
    )
    parser.add_argument("--data", default="", help="for publish: a description of the training data")
    parser.add_argument("--flags", help="settings that the file does not contain")
    parser.add_argument("--trust_network", action="store_true", help="import the functions that the weights name")
    parser.add_argument("--raw", action="store_true", help="the raw weights, not their moving average")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; errors print one line and exit with code 2."""
    with program(argv, bad_input=(ValueError,)):
        parser = make_parser()
        args = parser.parse_args(argv)
        if sum(name is not None for name in (args.path, args.to)) != _COMMANDS[args.command]:
            parser.error("convert and publish need PATH and TO, inspect PATH alone, and list neither")
        if args.command != "publish" and (args.license or args.data):
            parser.error("--license and --data are for publish")
        if args.command == "list":
            return print_text(pretrained.format_available(), lines=True)
        net = pretrained.load(args.path, args.flags, not args.raw, args.trust_network)
        print_text(pretrained.format_summary(net), lines=True)
        if args.to is None:
            return
        from diffusion_jax.report.model_card import model_card
        from diffusion_jax.report.publishing import publish

        workdir = local_path(args.path) if pretrained.is_workdir(args.path) else None
        if args.command == "publish":
            return print_text(f"Published: {publish(net, args.to, workdir, args.license, args.data)}")
        save = pretrained.save_safetensors if args.to.endswith(".safetensors") else pretrained.save_diffusers
        save(net, args.to)
        print_text(f"Written: {args.to}")
        to = pathlib.Path(args.to).expanduser()
        card = to.with_suffix(".md") if to.suffix == ".safetensors" else to / "README.md"
        if card.exists():
            return print_text(f"{card} exists and stays as it is.")
        write_text(card, model_card(net, to, workdir))
        advice = "" if pretrained.origin(net) else " (fill in the license)"
        print_text(f"Model card{advice}: {card}")


if __name__ == "__main__":
    main()
