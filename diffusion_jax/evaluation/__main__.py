"""Compares a set of images or other arrays with a reference set.

    diffusion-jax compare REFERENCE SAMPLES [--inception=PATH | --features=NAME] [--metrics=fid,kid,...]

Each set is a file of arrays (.npz with samples in arr_0, or with statistics mu and sigma), a folder of images, a run
directory (its newest samples), or a data set and split such as cifar10:train.
"""

import pathlib

from diffusion_jax.cli import Parser, program
from diffusion_jax.config import resolve
from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import require_number
from diffusion_jax.metrics import METRICS, Options, choose_metrics, needs_features


def main(argv: list[str] | None = None) -> None:
    """Compares the samples with the reference, and adds a record to the output file.

    A rerun reuses the reference's cached features, and after an interruption also the samples' cached features. Errors print
    one line and exit with code 2.
    """
    with program(argv, bad_input=(ValueError,)):
        arguments = make_parser().parse_args(argv)
        from diffusion_jax import data  # imports TensorFlow, which `program` has silenced
        from diffusion_jax.evaluation import features
        from diffusion_jax.evaluation.compare import check_comparable, compare

        requested = [name.strip() for name in arguments.metrics.split(",")] if arguments.metrics else []
        require_number("--batch_size", arguments.batch_size, 1)
        output = pathlib.Path(arguments.output).expanduser()
        output = output if output.suffix == ".json" else output / "metrics.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        reference, samples = (
            features.open_set(location, arguments.data_dir, arguments.image_size)
            for location in (arguments.reference, arguments.samples)
        )
        check_comparable(reference, samples)
        of_images, normalization = samples.is_of_images, None
        name = arguments.features or features.default_name(reference.name.partition(":")[0], of_images)
        if not of_images and reference.examples is not None:
            continuous = resolve({"data": {"levels": None}})["data"]
            normalization = data.find_normalizations(continuous, reference.examples).get("x")
        spatial_axes = 2 if samples.examples is None else samples.first.ndim - 2
        names = choose_metrics(requested, spatial_axes, of_images, bool(name))
        devices.start()
        pipeline = None
        if needs_features(names, of_images):
            extractor = features.from_name(name, arguments.inception, arguments.resize, of_images)
            mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
            pipeline = features.FeaturePipeline(extractor, mesh, arguments.batch_size)
        compare(reference, samples, names, output, pipeline, Options(normalization=normalization), {})


def make_parser() -> Parser:
    """Builds the argument parser."""
    parser = Parser("diffusion-jax compare", __doc__)
    add = parser.add_argument
    add("reference", help="the examples to compare with")
    add("samples", help="the examples to measure")
    text = "the FID network's weights: pt_inception-2015-12-05-6726825d.pth (in pytorch-fid's releases on GitHub) or "
    add("--inception", default="", help=f"{text}classify_image_graph_def.pb")
    add("--features", help="inception, digits, or module:function (examples [N, *spatial, C] -> features [N, D])")
    names = f"some of {', '.join(METRICS)}, and module:function"
    add("--metrics", help=f"{names}; by default feature metrics for images, all suitable metrics for other examples")
    add("--resize", default="tf1", help="to 299 pixels: tf1 (FID), pytorch (pytorch-fid's) or clean (clean-fid's)")
    add("--batch_size", type=int, default=64, help="examples per batch; the metrics do not depend on the batch size")
    add("--data_dir", default="", help="directory of the data sets, by default ~/tensorflow_datasets")
    add("--image_size", type=int, help="resizes images of different sizes")
    text = "a .json file, or the folder of metrics.json, created if missing: the record is added to the file, and the "
    add("--output", default="metrics.json", help=f"{text}pictures are written beside it")
    return parser


if __name__ == "__main__":
    main()
