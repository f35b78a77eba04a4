"""Writes a page about one run, or a page that compares several runs.

    diffusion-jax report DIR... [--output=PATH]

The page is one file that needs no network. For one local run, the file is DIR/report.html; for several runs, or a run in a
bucket, report.html in the current directory. --output names another file. The runs may be training meanwhile.
"""

import pathlib

from diffusion_jax.cli import Parser, program
from diffusion_jax.errors import print_text


def make_parser() -> Parser:
    """Builds the argument parser."""
    parser = Parser("diffusion-jax report", __doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="work directories of runs")
    parser.add_argument("--output", metavar="PATH", help="the file to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; errors print one line and exit with code 2."""
    with program(argv, bad_input=(ValueError,)):
        args = make_parser().parse_args(argv)
        from diffusion_jax.report import NAME, write_comparison
        from diffusion_jax.storage.objects import is_url

        is_single = len(args.directories) == 1 and not is_url(args.directories[0])
        directory = pathlib.Path(args.directories[0] if is_single else "")
        output = pathlib.Path(args.output or directory / NAME).expanduser()
        write_comparison(args.directories, output)
        print_text(f"Written: {output} ({output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
