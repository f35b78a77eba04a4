"""Lists the pictures in docs/images that are older than the code that draws them.

    python docs/check_pictures.py                  prints each stale picture, the changed files and the command; exits with 1
    python docs/check_pictures.py --draw IMAGE     runs the command that draws the picture, and records the sources
    python docs/check_pictures.py --drawn IMAGE    only records the sources, after the command ran by hand

`DRAWINGS` has the command of each picture. docs/images/drawn.json has the record: the version that drew the picture, the
date, and the SHA-256 of the picture and of each source at that time.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import diffusion_jax  # noqa: E402

IMAGES = ROOT / "docs" / "images"
RECORDS = IMAGES / "drawn.json"


class Drawing(NamedTuple):
    """A command for the shell in the repository's root, and the pictures that the command writes.

    sources: files, or patterns of files, that decide how the pictures look. The command of a diagram that is written by hand
    is empty; its sources describe the same content. shows_version: whether the pictures show the version that drew them.
    """

    images: tuple[str, ...]
    command: str
    sources: tuple[str, ...]
    shows_version: bool = False


_PICTURES = "diffusion_jax/pictures/*.py"
_TITLES = tuple(f"diffusion_jax/runs/{name}.py" for name in ("sampling_setup", "sample", "edit"))
_SAMPLES = (_PICTURES, "diffusion_jax/runs/examples.py", *_TITLES)  # samples beside training examples
_REPORT = tuple(
    f"diffusion_jax/report/{name}" for name in ("card.py", "collect.py", "figures.py", "page.py", "static/*.*")
)
_TRAIN_DIGITS = "python main.py --config=configs/digits.py --workdir=runs/digits"
_SAMPLE_DIGITS = "python main.py --workdir=runs/digits --mode=sample"
_TASKS = ("inpaint", "replace", "sdedit", "colorize", "super_resolution", "interpolate")


def _example(image: str, config: str, name: str) -> Drawing:
    """Returns the drawing of an example: train a config, and copy the picture of the samples."""
    workdir = f"runs/{name}"
    command = (
        f"python main.py --config=configs/{config}.py --workdir={workdir}"
        f" && python main.py --workdir={workdir} --mode=sample"
        f' && cp "$(ls -t {workdir}/samples/step*.png | head -1)" docs/images/{image}'
    )
    return Drawing((image,), command, (f"configs/{config}.py", *_SAMPLES))


DRAWINGS = (
    Drawing(
        ("report.png",),
        f"{_TRAIN_DIGITS} && {_SAMPLE_DIGITS}"
        " && python main.py --workdir=runs/digits --mode=evaluate --config.evaluation.likelihood=False"
        " && python main.py report runs/digits --output=runs/digits/report.html"
        " && python benchmarks/report_picture.py runs/digits/report.html --output=docs/images/report.png",
        ("benchmarks/report_picture.py", "configs/digits.py", *_REPORT, _PICTURES),
        shows_version=True,
    ),
    Drawing(
        ("first_pictures.png", "hero.webp", "hero.png", "social.png"),
        "python benchmarks/first_pictures.py runs/first_pictures --pictures",
        ("benchmarks/first_pictures.py", "examples/drawings.py", "configs/drawings.py", *_SAMPLES),
    ),
    Drawing(
        ("first_arrays.png",),
        "python benchmarks/first_arrays.py runs/first_arrays --picture",
        ("benchmarks/first_arrays.py", "examples/reaction_diffusion.py", "configs/patterns.py", *_SAMPLES),
    ),
    Drawing(
        ("sensors.png",),
        "python examples/reaction_diffusion.py && python main.py --config=configs/patterns.py --workdir=runs/patterns"
        " && python main.py --workdir=runs/patterns --mode=edit --config.editing.task=sparse --config.editing.share=0.05"
        " --config.editing.noise=0.05 --config.editing.example=0 --config.editing.num_samples=32 --config.sampling.steps=25"
        ' && cp "$(ls -t runs/patterns/samples/edits/sparse_*.png | head -1)" docs/images/sensors.png',
        ("examples/reaction_diffusion.py", "configs/patterns.py", _PICTURES, *_TITLES),
    ),
    Drawing(
        tuple(f"edit_{task}.png" for task in _TASKS),
        "python benchmarks/first_pictures.py runs/first_pictures"
        " && python benchmarks/editing_pictures.py runs/first_pictures",
        (
            "benchmarks/editing_pictures.py",
            "benchmarks/first_pictures.py",
            "examples/drawings.py",
            "configs/drawings.py",
        )
        + (_PICTURES, *_TITLES),
    ),
    _example("example_moons.png", "vectors", "moons"),
    _example("example_series.png", "series", "series"),
    _example("example_field.png", "field", "field"),
    _example("example_volume.png", "volume", "volume"),
    Drawing(
        ("samplers.svg",),
        "python benchmarks/samplers.py --plot=docs/images/samplers.svg",
        ("benchmarks/samplers.py",),
    ),
    Drawing(("cost.svg",), "python benchmarks/cost.py --plot=docs/images/cost.svg", ("benchmarks/cost.py",)),
    Drawing(
        tuple(
            f"ddpm_{name}"
            for name in (
                "noising.png",
                "noise_schedules.svg",
                "posterior.svg",
                "bound_terms.svg",
                "forward_reverse.png",
            )
        ),
        "python docs/pictures/ddpm_story.py",
        ("docs/pictures/ddpm_story.py",),
    ),
    Drawing(("choosing.svg",), "python docs/pictures/choosing.py", ("docs/pictures/choosing.py",)),
    Drawing(("architecture.svg",), "", ("docs/contributing/architecture.md",)),
)


def drawing_of(image: str) -> Drawing:
    """Returns the drawing that writes an image. Raises: SystemExit for an unknown image."""
    for drawing in DRAWINGS:
        if image in drawing.images:
            return drawing
    known = ", ".join(name for drawing in DRAWINGS for name in drawing.images)
    raise SystemExit(f"{image!r} is not in DRAWINGS of docs/check_pictures.py; known: {known}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def code_of(text: str) -> str:
    """Returns Python source without docstrings, lines of comments and empty lines, which change no picture."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            start, end = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[start - 1 : end] = [""] * (end - start + 1)
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def digests(sources: tuple[str, ...]) -> dict[str, str]:
    """Returns {path: SHA-256} of all files that match the sources; of Python files, the SHA-256 of the code."""
    found = {}
    for path in sorted({path for pattern in sources for path in ROOT.glob(pattern)}):
        content = code_of(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes()
        found[path.relative_to(ROOT).as_posix()] = _sha256(content)
    return found


def changes(drawing: Drawing, image: str, record: dict[str, Any] | None) -> list[str]:
    """Returns the reasons why a picture may be stale, [] for an up-to-date picture."""
    if record is None or record["picture"] != _sha256((IMAGES / image).read_bytes()):
        return ["the picture, without a record"]
    now, version = digests(drawing.sources), diffusion_jax.__version__
    found = sorted(path for path in now | record["sources"] if now.get(path) != record["sources"].get(path))
    return found + [f"the version, now {version}"] * (drawing.shows_version and record["version"] != version)


def read_records() -> dict[str, dict[str, Any]]:
    """Returns the records of docs/images/drawn.json, by image."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record(drawing: Drawing) -> None:
    """Records that the present code drew the pictures of a drawing."""
    records, sources = read_records(), digests(drawing.sources)
    drawn = {"version": diffusion_jax.__version__, "date": datetime.date.today().isoformat()}
    for image in drawing.images:
        records[image] = drawn | {"picture": _sha256((IMAGES / image).read_bytes()), "sources": sources}
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")


def draw(drawing: Drawing) -> None:
    """Runs the command of a drawing with this Python, and records the result. Raises: CalledProcessError."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(drawing.command or "true", shell=True, check=True, cwd=ROOT, env=environment)
    record(drawing)


def main() -> None:
    """Lists the stale pictures, or draws or records pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", nargs="+", default=[], metavar="IMAGE", help="runs the commands, then records")
    parser.add_argument("--drawn", nargs="+", default=[], metavar="IMAGE", help="records pictures that are redrawn")
    options = parser.parse_args()
    for names, function in ((options.draw, draw), (options.drawn, record)):
        for drawing in dict.fromkeys(map(drawing_of, names)):
            function(drawing)
    if options.draw or options.drawn:
        return
    records, num_stale = read_records(), 0
    for drawing in DRAWINGS:
        stale = {image: found for image in drawing.images if (found := changes(drawing, image, records.get(image)))}
        num_stale += len(stale)
        for image, found in stale.items():
            drawn = "drawn by version {version} on {date}".format(**records[image]) if image in records else "new"
            print(f"{image}, {drawn}; changed: {', '.join(found)}")
        if stale:
            print(f"    {drawing.command or 'written by hand: compare it with its source, then --drawn'}")
    print(f"{num_stale} of {sum(len(drawing.images) for drawing in DRAWINGS)} pictures are older than their sources")
    if num_stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
