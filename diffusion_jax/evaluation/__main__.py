"""python -m diffusion_jax.evaluation REFERENCE SAMPLES [--inception=PATH | --features=NAME] [--metrics=fid,kid,...]
python -m diffusion_jax.evaluation table DIR...

The first compares two sets of images, each an .npz (images in arr_0, or statistics mu and sigma), a folder, the directory of
a run (its newest samples), or a data set and its split, such as cifar10:train. The second prints what runs have measured.
"""

# An entry point, as main.py is: it stands above all floors.
import argparse
import pathlib
import sys


def main(argv: list[str] | None = None) -> None:
    """The command line; what is wrong is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    from diffusion_jax.runs import devices

    if argv[:1] == ["table"]:
        given = _table_parser().parse_args(argv[1:])
        run = table
    else:
        given = _parser().parse_args(argv)
        run = compare
        devices.silence_libraries()
    from diffusion_jax.data import DataError
    from diffusion_jax.pretrained import PretrainedError

    try:
        run(given)
    except (ValueError, DataError, PretrainedError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the features it has", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    """Ends the program with one line about its arguments."""
    print(f"error: {message}; see python -m diffusion_jax.evaluation --help", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.evaluation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.error = _fail  # without the usage, which would hide the line that says what is wrong
    add = parser.add_argument
    add("reference", help="what samples are compared with")
    add("samples", help="the images to be measured")
    add(
        "--inception",
        default="",
        help="weights of FID's network: pt_inception-2015-12-05-6726825d.pth (in pytorch-fid's releases on GitHub)\n"
        "or classify_image_graph_def.pb",
    )
    add("--features", help="inception, digits, or module:function of images uint8 [N, H, W, C] -> [N, D]")
    add(
        "--metrics",
        help="some of fid, sfid, kid, is, precision_recall, density_coverage, memorization; all unless given",
    )
    add("--resize", default="tf1", help="to 299 pixels: tf1 (FID), pytorch (pytorch-fid's) or clean (clean-fid's)")
    add("--batch_size", type=int, default=64, help="images at a time; no figure depends on it")
    add("--data_dir", default="", help="where data sets lie, unless in ~/tensorflow_datasets")
    add("--image_size", type=int, help="resizes images that have no one size")
    add("--channels", type=int, choices=(1, 3), help="makes all images gray (1) or of three channels (3)")
    add(
        "--output",
        default="metrics.json",
        help="a .json file, or the folder of metrics.json, created if missing: the record is added to the file,\n"
        "and the pictures are written beside it",
    )
    return parser


def compare(given: argparse.Namespace) -> None:
    """Measures one set of images against another."""
    from diffusion_jax.distributed import sharding
    from diffusion_jax.evaluation.compare import METRICS
    from diffusion_jax.evaluation.features import named
    from diffusion_jax.evaluation.images import open_set
    from diffusion_jax.pretrained.inception import WHERE
    from diffusion_jax.runs import devices
    from diffusion_jax.runs.set_metrics import check_comparable, measure

    wanted = [metric.strip() for metric in given.metrics.split(",")] if given.metrics else METRICS
    unknown = sorted(set(wanted) - set(METRICS))
    if unknown:
        raise ValueError(f"--metrics: {unknown[0]!r} is unknown; known: {', '.join(METRICS)}")
    if given.batch_size < 1:
        raise ValueError(f"--batch_size={given.batch_size} must be at least 1")
    output = _output_file(given.output)
    named_sets = given.reference, given.samples
    reference, samples = (open_set(what, given.data_dir, given.image_size, given.channels) for what in named_sets)
    check_comparable(reference, samples)
    features = given.features or ("digits" if reference.name.startswith("digits:") else "inception")
    if features == "inception" and not given.inception:
        raise ValueError(
            f"--inception=PATH is needed: the weights of FID's network ({WHERE}); or --features=digits, or module:function"
        )
    extractor = named(features, given.inception, given.resize)
    output.parent.mkdir(parents=True, exist_ok=True)
    devices.start()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
    measure(reference, samples, extractor, wanted, mesh, given.batch_size, output, {})


def _output_file(given: str) -> pathlib.Path:
    """The JSON file of --output, which is the file or its folder. Raises: ValueError if a file is in the folder's place."""
    path = pathlib.Path(given).expanduser()
    if given.endswith("/") or path.suffix != ".json" or path.is_dir():
        path = path / "metrics.json"
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output={given}: {folder} is a file; name a folder, or a file that ends in .json")
    return path


def _table_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffusion_jax.evaluation table", description="Figures of runs.")
    parser.error = _fail
    parser.add_argument("directories", nargs="+", help="directories with a metrics.json, or such files")
    return parser


def table(given: argparse.Namespace) -> None:
    """Prints a Markdown table: a row for each record, with its figures and the settings in which any two rows differ.

    Bits per dimension are of the likelihood.json beside a record, in the rows of the same weights, or in a row of their own.
    """
    from diffusion_jax.runs.metric_records import differing_settings, read_likelihood, read_records

    found, empty = [], []
    for name in given.directories:
        path = pathlib.Path(name).expanduser()
        path = path / "metrics.json" if path.is_dir() else path
        records, bound = read_records(path), read_likelihood(path.with_name("likelihood.json"))
        if bound:
            same = [
                record for record in records if all(record.get(key) == bound.get(key) for key in ("step", "weights"))
            ]
            for record in same:
                record |= {key: value for key, value in bound.items() if "bits_per_dim" in key}
            records += [] if same else [bound]
        if not records:
            empty.append(f"{path}: nothing has been measured there; run --mode=evaluate")
        found += [(path.parent, record) for record in records]
    if not found:
        raise ValueError(" ".join(empty))
    for line in empty:
        print(f"Note: {line}", file=sys.stderr)
    settings = [key for key in differing_settings([record for _, record in found]) if not key.endswith("_digest")]
    settings = list(dict.fromkeys(["step", "weights", "sampler", "steps", "features", "num_samples", *settings]))
    rows = [_row(directory, record, settings) for directory, record in found]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    columns.sort(key=lambda key: ["run", *settings].index(key) if key in ("run", *settings) else len(settings) + 1)
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")


def _row(directory: pathlib.Path, record: dict, settings: list[str]) -> dict[str, str]:
    from diffusion_jax.runs.metric_records import settings_of

    values = settings_of(record)
    row = {"run": str(directory)} | {key: str(values[key]) for key in settings if values.get(key) is not None}
    if "samples" in row:
        row["samples"] = pathlib.Path(row["samples"]).name
    for key, value in record.items():
        if isinstance(value, float) and not key.endswith(("_std", "_standard_error")):
            error = record.get(f"{key}_standard_error")
            row[key] = f"{value:.4g}" + (f" ± {error:.1g}" if error is not None else "")
    if "memorization" in record:
        row["close_share"] = f"{record['memorization']['close_share']:.4g}"
    return row


if __name__ == "__main__":
    main()
