"""Measures a set of images or other arrays against another.

    python -m diffusion_jax.evaluation REFERENCE SAMPLES [--inception=PATH | --features=NAME] [--metrics=fid,kid,...]

The sets are each a file of arrays (.npz with samples in arr_0, or statistics mu and sigma), a folder of
images, the directory of a run (its newest samples), or a data set and its split, such as cifar10:train.
"""

from diffusion_jax.cli import Parser, program
from diffusion_jax.distributed import signals
from diffusion_jax.metrics import METRICS


def main(argv: list[str] | None = None) -> None:
    """The command line; an error is one line and exit code 2. A rerun continues with the cached features."""
    with program(bad_input=(ValueError,)):
        args = make_parser().parse_args(argv)
        from diffusion_jax.runs.evaluate import compare_sets  # imports TensorFlow, now silenced

        signals.PROGRAM.resume_hint = signals.rerun_hint
        compare_sets(args)


def make_parser() -> Parser:
    """The arguments that compare two sets of examples."""
    parser = Parser("python -m diffusion_jax.evaluation", __doc__)
    add = parser.add_argument
    add("reference", help="the examples to compare with")
    add("samples", help="the examples to measure")
    add(
        "--inception",
        default="",
        help="weights of FID's network: pt_inception-2015-12-05-6726825d.pth (in pytorch-fid's releases on GitHub)\n"
        "or classify_image_graph_def.pb",
    )
    add("--features", help="inception, digits, or module:function of examples [N, *spatial, C] -> [N, D]")
    add("--metrics", help=f"some of {', '.join(METRICS)}; by default all that suit the examples")
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


if __name__ == "__main__":
    main()
