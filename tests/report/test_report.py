"""report.html for complete, killed, damaged and empty work directories, the page's sections, and model cards."""

import dataclasses
import html.parser
import json
import re
import shlex

import numpy as np
import pytest
import yaml

from diffusion_jax import cli, pictures, pretrained
from diffusion_jax.config import experiment, override
from diffusion_jax.provenance import Provenance
from diffusion_jax.report import __main__ as command
from diffusion_jax.report import page as page_module
from diffusion_jax.report import write_comparison, write_report
from diffusion_jax.report.collect import sample_command, train_command
from diffusion_jax.report.figures import make_series, training_charts
from diffusion_jax.report.model_card import model_card
from diffusion_jax.runs.workdir import to_dict
from helpers.simulated_runs import write_log, write_results, write_run

SECTIONS = ["curves", "training-samples", "denoising", "likelihood", "metrics", "pictures", "launches", "config"]
SECTIONS += ["environment", "reproduce"]


class Page(html.parser.HTMLParser):
    """A parsed page: sections, texts, images, and addresses that the page would load."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.images, self.num_scripts, self.loaded = [], [], 0, []
        self.text, self._tags = "", [""]
        source = path.read_text()
        self.size = len(source.encode())
        data = map(json.loads, re.findall(r'"application/json">(.*?)</script>', source, re.DOTALL))
        self.charts, self.frames = [], []
        for value in data:
            (self.frames if "captions" in value else self.charts).append(value)
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._tags.append(tag)
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        self.num_scripts += tag == "script" and "type" not in attributes
        for name in ("src", "href"):
            if not attributes.get(name, "#").startswith(("#", "data:")):
                self.loaded.append(attributes[name])

    def handle_data(self, data):
        if self._tags[-1] not in ("script", "style"):
            self.text += data


def test_a_complete_run_has_every_section(tmp_path):
    """Also every frame of training and denoising."""
    write_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.sections == SECTIONS
    assert page.num_scripts == 2 and not page.loaded
    assert page.size < 1e6
    assert {"Loss", "Learning rate"} <= {chart["title"] for chart in page.charts}
    for text in ("0.11 ± 0.04", "3.21 ± 0.02", "300.unreadable", "500.partial", "12 samples for 64 dimensions"):
        assert text in page.text, text
    launches = page.text[page.text.index("steps done again later") :]
    assert "16:400600200" in launches  # 16:40, from step 0 to step 600, of which 200 were lost
    training, denoising = page.frames
    assert training["captions"][-1] == "after 1,000 training steps"
    assert training["start"] == 3 and len(training["images"]) == 4
    assert denoising["captions"][:2] == ["network time t = 999", "network time t = 774"]
    for each in page.frames:  # each picture once: the first picture shown is in the page itself
        missing = [i for i, images in enumerate(each["images"]) if images[0] is None]
        assert missing == [each["start"]]


def test_an_empty_directory_and_a_missing_one_give_a_page(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        page = Page(write_report(directory))
        assert page.sections == ["curves"]
        assert "holds no run yet" in page.text and "Nothing is logged yet" in page.text


def test_damaged_files_are_notes(tmp_path):
    write_run(tmp_path / "run")
    samples = tmp_path / "run" / "samples"
    damaged = {name: b"[{" for name in ("config.json", "goodput.json", "metrics.json")}
    damaged |= {"samples/train_step00000500.png": b"\x89PNG damaged"}
    damaged |= {f"samples/trajectories/{path.name}": b"PK" for path in (samples / "trajectories").glob("*.npz")}
    for name, content in damaged.items():
        (tmp_path / "run" / name).write_bytes(content)
    page = Page(write_report(tmp_path / "run"))
    assert "curves" in page.sections
    for name in damaged.keys() - {"goodput.json"}:
        assert f"{name.rpartition('/')[2]} could not be read" in page.text, name


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
    assert page.num_scripts == 2 and not page.loaded
    assert EVIL in page.text
    assert all(image.startswith("data:image/") for image in page.images)
    assert any(EVIL in chart["title"] for chart in page.charts)


def test_a_page_stays_small(tmp_path, monkeypatch):
    """Noise pictures, which do not compress, with a fifteenth of the real limit."""
    monkeypatch.setattr(page_module, "PICTURE_BYTES", page_module.PICTURE_BYTES // 15)
    write_log(tmp_path)
    (tmp_path / "samples").mkdir()
    rng = np.random.default_rng(0)
    for step in range(1, 41):
        noise = rng.integers(0, 256, (96, 96, 3), np.uint8)
        pictures.save(tmp_path / "samples" / f"train_step{step:08d}.png", noise)
        pictures.save(tmp_path / f"picture{step}.png", noise)
    written = Page(write_report(tmp_path))
    assert sum(map(len, written.images)) + len(json.dumps(written.frames)) < 5e6 / 15
    assert "after 40 training steps" in written.frames[0]["captions"]
    assert "of 40 pictures are in this file." in written.text


def test_metrics_have_names_and_directions(tmp_path):
    write_run(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "Frechet distance, lower is better</th>" in text and "frechet_distance, lower" not in text
    assert "Frechet distance, frechet_distance in files</dt>" in text


def test_runs_are_compared(tmp_path):
    write_run(tmp_path / "a" / "run")
    write_log(tmp_path / "b" / "run", num_steps=800)
    write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.sections == ["states", "curves", "config", "metrics", "samples"]
    assert [series["label"] for series in page.charts[0]["series"]] == ["run", "run (2)"]
    assert "training.num_steps" in page.text and "optimizer.learning_rate" not in page.text


def test_a_comparison_leaves_out_sections_with_invalid_values(tmp_path):
    for name in "ab":
        write_log(tmp_path / name)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1000, "loss": 10**400}) + "\n")
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.sections == ["states", "config"] and "A section is left out, because a file holds" in page.text


def test_the_command_and_the_mode_write_a_page_and_nothing_else(tmp_path, capsys):
    write_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for write in (lambda: command.main([str(tmp_path)]), lambda: cli.main([f"--workdir={tmp_path}", "--mode=report"])):
        write()
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert after.pop(tmp_path / "report.html") and after == before
        (tmp_path / "report.html").unlink()
    with pytest.raises(SystemExit) as caught:
        command.main([str(tmp_path / "missing")])
    assert caught.value.code == 2 and "is no directory" in capsys.readouterr().err


# ---- Parts


def test_intervals_have_their_mean_lowest_and_highest_value():
    series = make_series("x", np.arange(12.0), np.array([0, 1, 5, 3, 4, 5, 9, 7, 8, 9, 10, 11.0]), max_points=4)
    assert series["x"] == [1, 4, 7, 10]
    assert series["mean"] == [2, 4, 8, 10]
    assert series["low"] == [0, 3, 7, 9] and series["high"] == [5, 5, 9, 11]
    assert series["values"] == 12


def test_other_values_of_the_log_have_charts_of_their_own():
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0, "frechet_distance": 3.0, "note": "x"}]
    charts = training_charts({"run": lines})
    assert [chart["title"] for chart in charts] == ["Loss", "frechet distance"]
    assert charts[0]["series"][0]["x"] == [1, 2] and charts[0]["series"][0]["mean"] == [2, 1]


def parsed(command, mode):
    words = shlex.split(command)
    assert words[0] == "diffusion-jax"
    result = cli.parse(words[1:])
    assert result.mode == mode
    return to_dict(result.config)


@pytest.mark.parametrize("name", ["digits_conditional", "imagenet_adm:128", "cifar10_classifier"])
def test_the_command_of_training_parses_to_the_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = {"training.num_steps": "77", "optimizer.learning_rate": "3e-05", "sampling.sampler": "heun", "seed": "5"}
    config = override(experiment(name), changed)
    command = train_command(config)
    assert f"--config={name} " in command
    mode = "train_classifier" if "classifier" in name else "train"
    assert parsed(command, mode) == to_dict(config)


def test_the_command_of_samples_has_what_differs_from_the_run():
    config = experiment("digits")
    sampling = config.sampling.to_dict() | {"clip": True, "sampler": "ddim", "label": [3]}
    provenance = Provenance("step4_ema", {"sampling": sampling}, {"jax": "0", "conditions": "a b.npy"})
    start, *changed = shlex.split(sample_command(config, provenance).replace(" --mode=sample", "", 1))[1:]
    assert start == "--workdir=DIR" and sorted(changed) == [
        "--config.sampling.conditions=a b.npy",
        "--config.sampling.label=(3,)",
        "--config.sampling.sampler=ddim",
    ]


# ---- Model cards


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def run(tmp_path):
    """(a run at step 1000, its model without parameters)."""
    directory = tmp_path / "run"
    write_run(directory)
    return directory, of_weights(pretrained.describe(directory), "ema")


def of_weights(net, kind):
    return dataclasses.replace(net, provenance=Provenance(f"step1000_{kind}", {"step": 1000, "weights": kind}))


def test_a_card_is_filled_from_the_run(run, tmp_path):
    directory, net = run
    card = model_card(net, tmp_path / "digits", directory)
    found = front_matter(card)
    assert found["license"] == "unknown" and found["library_name"] == "diffusers" and found["datasets"] == ["digits"]
    for text in ("1,498 examples", "1,000 of batch 64", "0.11 ± 0.04", "3.21 ± 0.02", "--config=digits_conditional"):
        assert text in card, text
    card = model_card(of_weights(net, "raw"), tmp_path / "digits", directory)  # the metrics belong to other weights
    assert "Nothing was measured of these weights" in card
    card = model_card(net, tmp_path / "x.safetensors", None)  # as for published weights
    assert front_matter(card)["library_name"] == "diffusion_jax"
    assert "## Training" not in card and "network times 0 ..." in card
