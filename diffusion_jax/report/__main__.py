"""Writes a page about one run, or one that compares several.

    python -m diffusion_jax.report DIR... [--output=PATH]

The page is one file that needs no network. Of one run it is report.html in DIR, of several report.html here, unless
--output names another file. The runs may be training meanwhile.
"""

import argparse
import pathlib

from diffusion_jax.runs.console import CommandParser, reported_errors


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = CommandParser("python -m diffusion_jax.report", __doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="work directories of runs")
    parser.add_argument("--output", metavar="PATH", help="the file to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; an error is one line and exit code 2."""
    args = make_parser().parse_args(argv)
    from diffusion_jax.runs import devices

    devices.silence_libraries()
    from diffusion_jax.report import NAME, write_comparison
    from diffusion_jax.storage.objects import is_url

    is_single = len(args.directories) == 1 and not is_url(args.directories[0])
    output = pathlib.Path(args.output or (pathlib.Path(args.directories[0]) / NAME if is_single else NAME)).expanduser()
    with reported_errors():
        write_comparison(args.directories, output)
    print(f"Written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
