"""report.html: what it shows of complete, killed, damaged and empty work directories, and how large it is."""

import html.parser
import json
import re

import numpy as np
import pytest

from diffusion_jax import cli, pictures
from diffusion_jax.report import __main__ as command
from diffusion_jax.report import page as page_module
from diffusion_jax.report import write_comparison, write_report
from diffusion_jax.run_dir import RunDir
from helpers.simulated_runs import write_log, write_results, write_run

SECTIONS = ["curves", "training-samples", "denoising", "samples", "likelihood", "metrics", "pictures", "launches"]
SECTIONS += ["config", "environment", "reproduce"]


class Page(html.parser.HTMLParser):
    """The parts of a page: sections, texts, images, and what it would load."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.images, self.scripts, self.loaded = [], [], [], []
        self.text, self._tags = "", [""]
        source = path.read_text()
        self.size = len(source.encode())
        self.data = json.loads(re.search(r'id="data">(.*?)</script>', source, re.DOTALL).group(1))
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._tags.append(tag)
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        if tag == "script":
            self.scripts.append(attributes)
        for name in ("src", "href"):
            if not attributes.get(name, "#").startswith(("#", "data:")):
                self.loaded.append(attributes[name])

    def handle_data(self, data):
        if self._tags[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    directory = tmp_path_factory.mktemp("complete") / "run"
    write_run(directory)
    return directory, Page(write_report(directory))


def test_a_complete_run_has_every_section(complete):
    _, page = complete
    assert page.sections == SECTIONS
    assert len(page.scripts) == 3 and not page.loaded
    assert page.size < 1e6
    assert {"Loss", "Learning rate"} <= {chart["title"] for chart in page.data["charts"].values()}
    for text in ("0.1067 ± 0.04", "3.21 ± 0.02", "class 1: one", "300.unreadable", "500.partial", "jax 0.10.2"):
        assert text in page.text, text
    launches = page.text[page.text.index("steps done again later") :]
    assert "16:400600200" in launches  # 16:40, from step 0 to step 600, of which 200 were lost


def test_frames_step_through_training_and_denoising(complete):
    _, page = complete
    frames = page.data["frames"]
    assert frames["training-samples"]["captions"][-1] == "after 1,000 training steps"
    assert frames["training-samples"]["start"] == 3 and len(frames["training-samples"]["images"]) == 4
    assert frames["denoising"]["captions"][:2] == ["network time t = 999", "network time t = 774"]
    assert len(frames["denoising"]["images"]) == 6
    for each in frames.values():  # each picture once: the first one shown is in the page itself
        missing = [i for i, images in enumerate(each["images"]) if images[0] is None]
        assert missing == [each["start"]]


def test_an_empty_directory_and_a_missing_one_give_a_page(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        page = Page(write_report(directory))
        assert page.sections == ["curves"]
        assert "holds no run yet" in page.text and "Nothing is logged yet" in page.text


@pytest.mark.parametrize("name", ["config.json", "goodput.json", "metrics.json"])
def test_a_damaged_file_is_a_note(tmp_path, name):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"[{")
    page = Page(write_report(tmp_path / "run"))
    assert name == "goodput.json" or f"{name} could not be read" in page.text
    assert "curves" in page.sections


def test_a_damaged_picture_and_trajectory_are_notes(tmp_path):
    write_run(tmp_path / "run")
    samples = tmp_path / "run" / "samples"
    (samples / "train_step00000500.png").write_bytes(b"\x89PNG damaged")
    next((samples / "trajectories").glob("*.npz")).write_bytes(b"PK")
    page = Page(write_report(tmp_path / "run"))
    assert "train_step00000500.png could not be read" in page.text
    assert "n12.npz could not be read" in page.text


EVIL = '</script><script>alert("x")</script>'


def test_text_from_data_and_configs_is_escaped(tmp_path):
    directory = tmp_path / "<script>alert(1)<"
    write_log(directory)
    write_results(directory, classes=(EVIL, "<img src=x onerror=alert(1)>", "'\""))
    config = json.loads((directory / "config.json").read_text())
    config["data"]["data_dir"] = EVIL
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1000, EVIL: 1.0}) + "\n")
    page = Page(write_report(directory))
    assert len(page.scripts) == 3 and not page.loaded
    assert EVIL in page.text
    assert all(image.startswith("data:image/") for image in page.images)
    assert any(EVIL in chart["title"] for chart in page.data["charts"].values())


def test_a_page_stays_small(tmp_path, monkeypatch):
    """Pictures of noise, which do not compress, with a fifteenth of the real limit."""
    monkeypatch.setattr(page_module, "PICTURE_BYTES", page_module.PICTURE_BYTES // 15)
    write_log(tmp_path)
    (tmp_path / "samples").mkdir()
    rng = np.random.default_rng(0)
    for step in range(1, 41):
        noise = rng.integers(0, 256, (96, 96, 3), np.uint8)
        pictures.save(tmp_path / "samples" / f"train_step{step:08d}.png", noise)
        pictures.save(tmp_path / f"picture{step}.png", noise)
    written = Page(write_report(tmp_path))
    assert sum(map(len, written.images)) + len(json.dumps(written.data["frames"])) < 5e6 / 15
    assert "after 40 training steps" in written.data["frames"]["training-samples"]["captions"]
    assert "of 40 pictures are in this file." in written.text


def test_runs_are_compared(tmp_path):
    write_run(tmp_path / "a" / "run")
    write_log(tmp_path / "b" / "run", num_steps=800)
    write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.sections == ["states", "curves", "config", "metrics", "samples"]
    loss = page.data["charts"]["curve0"]
    assert [series["label"] for series in loss["series"]] == ["run", "run (2)"]
    assert "training.num_steps" in page.text and "optimizer.learning_rate" not in page.text


def test_the_command_writes_a_page(tmp_path, capsys):
    write_log(tmp_path / "run")
    command.main([str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").exists()
    with pytest.raises(SystemExit) as caught:
        command.main([str(tmp_path / "missing")])
    assert caught.value.code == 2
    assert "is no directory" in capsys.readouterr().err


def test_the_mode_changes_nothing_but_the_page(tmp_path):
    write_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    cli.main([f"--workdir={tmp_path}", "--mode=report"])
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after.pop(tmp_path / "report.html") and after == before


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    cli._write_report(None, RunDir(tmp_path / "run"))
    out = capsys.readouterr().out
    assert out.startswith("Note: ") and "could not be written" in out and out.count("\n") == 1
