"""The text blocks of README, start pages and guides are what the commands above them print.

A command runs as the page has it, or with fewer steps and a smaller network. Then the numbers of the block that depend on the
training, the machine or the moment stand for any numbers.
"""

import importlib.util
import inspect
import math
import pathlib
import re
import shlex
import types

import pytest
from PIL import Image

from benchmarks import first_contact
from diffusion_jax import cli, data, pretrained
from diffusion_jax.config import experiment
from diffusion_jax.distributed import devices
from diffusion_jax.pretrained.parameters import parameter_shapes
from diffusion_jax.run_dir import RunDir
from helpers.configs import digits_config
from helpers.pages import blocks, commands, name, pages
from helpers.paths import ROOT
from helpers.program import finish, start

PAGES = [page for page in pages() if page.name == "README.md" or page.parent.name in ("start", "guides")]
WITH_TEXT = {name(page) for page in PAGES if any(block.kind == "text" for block in blocks(page))}


def quoted(page):
    """The text blocks of a page."""
    return [block.text for block in blocks(ROOT / page) if block.kind == "text"]


def check(text, printed, *loose):
    """Finds a text, in which "..." is any text, in what was printed, with other spaces. loose: patterns of any word."""
    for part in loose:
        assert re.search(part, text), part
        text = re.sub(part, "\0", text)
    pattern = r"\s+".join(map(re.escape, text.split())).replace(re.escape("..."), ".*?").replace("\0", r"\S+")
    assert re.search(pattern, printed, re.DOTALL), f"{pattern}\n\nis not in\n\n{printed}"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the blocks of a page of docs/start in an empty directory; returns what each command printed.

    workdir: of the commands that run. changes: settings of every command.
    """
    for link in ("configs", "examples"):
        (tmp_path / link).symlink_to(ROOT / link)
    monkeypatch.chdir(tmp_path)

    def run_page(page, workdir, changes):
        printed, namespace = [], {}
        for block in blocks(ROOT / "docs" / "start" / page):
            if block.kind in ("python", "py"):
                exec(block.text, namespace)
            for command in commands(block.text) if block.kind == "sh" else ():
                words = shlex.split(command.removeprefix("python main.py"))
                if f"--workdir={workdir}" in words:
                    kept = [word for word in words if word.partition("=")[0] not in changes]
                    cli.main([*kept, *(f"{key}={value}" for key, value in changes.items())])
                    printed.append(capsys.readouterr().out)
        return printed

    return run_page


def run_example(file, capsys, *changed):
    """Runs a script of examples/ with another text for a part of the script; returns what the script printed."""
    text = (ROOT / "examples" / file).read_text()
    if changed:
        assert changed[0] in text
        text = text.replace(*changed)
    exec(compile(text, file, "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


FEW_STEPS = {"--config.training.num_steps": 2, "--config.training.sample_every": 0}
FEW_STEPS |= {"--config.sampling.steps": 8, "--config.sampling.trajectory": 0}
SMALL = FEW_STEPS | {"--config.model.channels": 4, "--config.model.num_groups": 2}
SMALL |= {"--config.model.channel_multipliers": "1,1", "--config.evaluation.batch_size": 950}
SHORT = 'TIME = {"train": 2000, "test": 200}, 24, 6000', 'TIME = {"train": 2000, "test": 200}, 24, 1'


@pytest.mark.whole
def test_first_arrays(run, capsys):
    printed = run_example("reaction_diffusion.py", capsys, *SHORT)
    (text,) = quoted("docs/start/first_arrays.md")
    check(text, printed)
    run("first_arrays.md", "runs/patterns", SMALL)  # only that every block of the page runs


@pytest.mark.whole
def test_sensors(run, capsys):
    run_example("reaction_diffusion.py", capsys, *SHORT)
    fast = {"--config.sampling.sampler": "ddim", "--config.sampling.steps": 1, "--config.evaluation.batch_size": 190}
    _, edit, evaluate, _ = run("sensors.md", "runs/patterns", SMALL | fast)
    chi_squared, calibration = quoted("docs/start/sensors.md")
    check(chi_squared, edit, r"2,000", r"1\.4")
    found = re.search(r"mean of channel 1.*? more\.", calibration, re.DOTALL)
    check(calibration.replace(found[0], "..."), evaluate, r"[01]\.\d{3}")


@pytest.mark.whole
def test_first_pictures_and_the_status(run, capsys, monkeypatch):
    run_example("drawings.py", capsys, "LARGE = 12", "LARGE = 2")
    training, sampling, metrics = quoted("docs/start/first_pictures.md")
    net = pretrained.from_config(experiment("drawings"))
    shapes = parameter_shapes(net.model, net.example_shape)
    assert f"{sum(map(math.prod, shapes.values())):,} parameters" in training
    narrow = {"--config.model.channels": 8, "--config.model.channel_multipliers": "1,"}
    train, sample, _, evaluate = run("first_pictures.md", "runs/drawings", FEW_STEPS | narrow)
    check(training, train, r"1,064,547")
    check(sampling.replace("step1500", "step2").replace("pp25", "pp8"), sample)
    check(metrics.replace("step1500", "step2"), evaluate, r"(?<=copies  )\S+")

    monkeypatch.setattr(RunDir, "find_holder", lambda directory: "process 4708 of vm")
    cli.main(["--workdir=runs/drawings", "--mode=status", "--config.training.num_steps=1500"])
    (screen,) = quoted("docs/guides/operations.md")
    screen = screen.replace("none yet", "...").partition("; compile")[0]
    check(screen, capsys.readouterr().out, r"\d[\d.,:]*", "[█▇▆▅▄▃▂▁]+")


@pytest.mark.whole
def test_the_plan():
    code, out, err = finish(start("--config=configs/cifar10.py", "--mode=plan", "--config.training.batch_size=8"))
    assert code == 0, err
    (text,) = quoted("docs/guides/speed_and_memory.md")
    check(text, out)


def test_the_folder(tmp_path):
    image = Image.new("RGB", (4, 4))
    for kind, count in (("birds", 401), ("cats", 401), ("dogs", 401)):
        (tmp_path / kind).mkdir()
        for i in range(count):
            image.convert("RGBA" if (kind, i) == ("cats", 7) else "RGB").save(tmp_path / kind / f"{i}.png")
    frames = [image, Image.new("RGB", (4, 4), "white")]
    frames[0].save(tmp_path / "dogs" / "run.webp", save_all=True, append_images=frames[1:], lossless=True)
    for skipped in ("a.gif", "b.gif", "c.txt"):
        (tmp_path / skipped).touch()
    config, lines = digits_config(), []
    config.data.update(dataset="folder", data_dir=str(tmp_path), image_size=4, channels=3)
    data.load(config.data, log=lines.append)
    (text,) = quoted("docs/guides/your_images.md")
    check(text, "\n".join(lines))


def test_the_installation(tmp_path, capsys, monkeypatch):
    error, first_check, device = quoted("docs/start/install.md")
    devices.start()
    check(device.replace("1 cpu device", "..."), capsys.readouterr().out, r"\d+\.\d+\.\d+")
    words = "bit-identical after a checkpoint"
    assert words in inspect.getsource(first_contact.Checks.resume)
    checks = types.SimpleNamespace(resume=lambda: words)
    ((_, line),) = first_contact.run_checks(checks, ["resume"])
    check(first_check, line, r"\d+")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda *name: None if name == ("tensorflow_datasets",) else find_spec(*name)
    )
    with pytest.raises(SystemExit):
        cli.main(["--config=configs/cifar10.py", f"--workdir={tmp_path / 'run'}"])
    check(error, capsys.readouterr().err)


def test_every_text_block_has_a_test():
    code = pathlib.Path(__file__).read_text()
    for page in WITH_TEXT:
        assert f'quoted("{page}")' in code, page
