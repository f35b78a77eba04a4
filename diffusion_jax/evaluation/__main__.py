"""Measures a set of images against another, and prints the metrics of runs.

    python -m diffusion_jax.evaluation REFERENCE SAMPLES [--inception=PATH | --features=NAME] [--metrics=fid,kid,...]
    python -m diffusion_jax.evaluation table DIR...

The first compares two sets of images, each an .npz (images in arr_0, or statistics mu and sigma), a folder, the directory of
a run (its newest samples), or a data set and its split, such as cifar10:train. The second prints the metrics of runs.
"""

import argparse
import sys

from diffusion_jax.runs.console import CommandParser, exit_with_error, reported_errors


def main(argv: list[str] | None = None) -> None:
    """The command line; an error is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with reported_errors():
            if argv[:1] == ["table"]:
                _print_table(table_parser().parse_args(argv[1:]).directories)
            else:
                _compare(comparison_parser().parse_args(argv))
    except KeyboardInterrupt:
        exit_with_error("interrupted; rerun the same command to resume with the cached features", 130)


def _compare(args: argparse.Namespace) -> None:
    from diffusion_jax.runs import devices

    devices.silence_libraries()
    from diffusion_jax.runs.set_metrics import compare_sets  # imports TensorFlow, now silenced

    compare_sets(args)


def _print_table(directories: list[str]) -> None:
    from diffusion_jax.runs.metric_records import format_table, read_runs

    runs, notes = read_runs(directories)
    if not runs:
        raise ValueError(" ".join(notes))
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    print(format_table(runs))


def comparison_parser() -> argparse.ArgumentParser:
    """The arguments that compare two sets of images."""
    parser = CommandParser("python -m diffusion_jax.evaluation", __doc__)
    add = parser.add_argument
    add("reference", help="the images to compare with")
    add("samples", help="the images to measure")
    add(
        "--inception",
        default="",
        help="weights of FID's network: pt_inception-2015-12-05-6726825d.pth (in pytorch-fid's releases on GitHub)\n"
        "or classify_image_graph_def.pb",
    )
    add("--features", help="inception, digits, or module:function of images uint8 [N, H, W, C] -> [N, D]")
    add(
        "--metrics",
        help="some of fid, sfid, kid, is, precision_recall, density_coverage, memorization; by default all",
    )
    add("--resize", default="tf1", help="to 299 pixels: tf1 (FID), pytorch (pytorch-fid's) or clean (clean-fid's)")
    add("--batch_size", type=int, default=64, help="images at a time; no metric depends on it")
    add("--data_dir", default="", help="directory of the data sets, by default ~/tensorflow_datasets")
    add("--image_size", type=int, help="resizes images of different sizes")
    add(
        "--output",
        default="metrics.json",
        help="a .json file, or the folder of metrics.json, created if missing: the record is added to the file,\n"
        "and the pictures are written beside it",
    )
    return parser


def table_parser() -> argparse.ArgumentParser:
    """The arguments that print the metrics of runs."""
    parser = CommandParser("python -m diffusion_jax.evaluation table", "Metrics of runs.")
    parser.add_argument("directories", nargs="+", help="directories with a metrics.json, or such files")
    return parser


if __name__ == "__main__":
    main()
