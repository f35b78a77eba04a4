"""report.html for complete, killed, damaged and empty work directories, the page's sections, and model cards."""

import dataclasses
import datetime
import html.parser
import json
import os
import re
import shlex

import jax
import numpy as np
import pytest
import yaml

from diffusion_jax import cli, pictures, pretrained
from diffusion_jax.config import SETTINGS, experiment, override
from diffusion_jax.provenance import Provenance
from diffusion_jax.report import __main__ as command
from diffusion_jax.report import page as page_module
from diffusion_jax.report import write_comparison, write_report
from diffusion_jax.report.card import newest_result
from diffusion_jax.report.collect import collect, sample_command, train_command
from diffusion_jax.report.figures import make_series, run_clock, training_charts
from diffusion_jax.report.model_card import model_card
from diffusion_jax.report.publishing import publish
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs.workdir import to_dict
from helpers.simulated_runs import START, simulated_lines, write_log, write_results, write_run

SECTIONS = ["summary", "curves", "training-samples", "denoising", "metrics", "pictures", "launches", "config"]
SECTIONS += ["environment", "reproduce"]


class Page(html.parser.HTMLParser):
    """A parsed page: the report's JSON with its sections, texts, pictures and curves; addresses that the page loads."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.num_scripts, self.loaded = [], 0, []
        source = path.read_text()
        self.size = len(source.encode())
        self.feed(source)
        found = re.findall(r'<script type="application/json" id="report">(.*?)</script>', source, re.DOTALL)
        (self.report,) = map(json.loads, found)
        self.sections = [section["id"] for section in self.report["sections"]]
        strings = list(self._strings(self.report))
        self.images = [text for text in strings if text.startswith("data:image/")]
        self.text = "\n".join(text for text in strings if not text.startswith("data:image/"))
        (self.curves,) = self.blocks("curves") or [{"runs": [], "charts": []}]
        self.charts, self.frames = self.curves["charts"], self.blocks("frames")

    def blocks(self, kind):
        """The values of all blocks of a kind."""
        return [block[kind] for section in self.report["sections"] for block in section["blocks"] if kind in block]

    def _strings(self, value):
        if isinstance(value, dict):
            yield from (text for pair in value.items() for each in pair for text in self._strings(each))
        elif isinstance(value, list):
            yield from (text for each in value for text in self._strings(each))
        else:
            yield str(value)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.num_scripts += tag == "script" and "type" not in attributes
        for name in ("src", "href"):
            if not attributes.get(name, "#").startswith("#"):
                self.loaded.append(attributes[name])


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
    training, denoising = page.frames
    assert training["captions"][-1] == "after 1,000 training steps"
    assert training["start"] == 3 and len(training["images"]) == 4
    assert denoising["captions"][:2] == ["network time t = 999", "network time t = 774"]
    assert len(set(page.images)) == len(page.images) - 1  # each picture once; finished samples are x_t and x_0


def test_the_card_answers_at_a_glance(tmp_path):
    write_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "1000"
    checkpoint.mkdir()
    (checkpoint / "digests.json").write_text("{}")
    os.utime(checkpoint / "digests.json", (START, START))
    (card,) = Page(write_report(tmp_path)).blocks("card")
    facts = card["facts"]
    assert facts["data"] == "1,498 images of digits (train), size 8 x 8 x 1"
    assert facts["objective"] == "prediction eps, loss simple, cosine schedule, T = 1,000"
    assert facts["network"] == "unet, 32 channels x (1, 2), 651,041 parameters"
    assert (
        facts["steps"] == "step 1,000 of 1,000 (100%), batch 64"
        and facts["duration"] == "35:00 on 1 x cpu, launches: 2"
    )
    assert facts["trained"] == "2026-09-21 14:13:20 UTC to 2026-09-21 14:56:40 UTC"
    assert facts.keys() >= {"loss", "state", "speed"}
    assert facts["checkpoint"] == "step 1,000, 2026-09-21 14:13:20 UTC"
    assert card["result"]["name"] == "bits per dimension: lower is better"
    assert card["result"]["value"] == "3.21 ± 0.02" and "step 1000, EMA weights" in card["result"]["source"]
    assert card["picture"]["caption"].startswith("samples/") and card["picture"]["src"].startswith("data:image/")


def record(value, error, **settings):
    return {"kernel_distance": value, "kernel_distance_standard_error": error, "reference": "digits:train"} | settings


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(0.5, 0.1)], "5.0 standard errors above equal distributions."),
        ([record(0.1, 0.1)], "No difference found."),
        ([record(0.9, 0.1, step=1), record(0.5, 0.1)], "Better than 0.90 ± 0.10 before, at step 1, "),
        ([record(0.1, 0.1, step=1), record(0.5, 0.1)], "Worse than 0.10 ± 0.10 before, at step 1, "),
        ([record(0.6, 0.1, step=1), record(0.5, 0.1)], "Similar to 0.60 ± 0.10 before, at step 1, "),
        ([record(0.5, 0.1, memorization={"close_share": 0.4})], "40% of the samples are near copies"),
        ([record(0.5, 0.1, notes={"kernel_distance": "few samples"})], "Caution: few samples."),
        ([{"fid": 3.5, "reported": {"fid": 3.17}}], "The paper reports an FID of 3.17."),
        ([{"fid": 3.0}, {"fid": 3.5, "num_samples": 10}], "No other measurement with these settings"),
        ([{"precision": 0.5}, {"precision": 0.6}], "Better than 0.5 before"),
        ([{"mean_z": -4.0}, {"mean_z": 3.0}], "Better than -4 before"),
    ],
)
def test_a_result_has_a_verdict(records, expected):
    assert expected in newest_result(records, [])["verdict"]


def test_the_card_shows_the_metric_that_is_listed_first():
    found = newest_result([{"precision": 0.5, "fid_clean": 3.5, "sampling": {"sampler": "ddim"}, "steps": 50}], [])
    assert found["name"].startswith("Frechet Inception distance (FID), clean resize: lower is better")
    assert found["value"] == "3.5" and "no standard error" in found["name"] and "ddim with 50 steps" in found["source"]
    several = {"kernel_distance": 0.1, "kernel_distance_standard_error": 0.04, "memorization": {"close_share": 0.0}}
    assert newest_result([several], [])["others"] == "share of near copies 0"
    assert newest_result([{"num_samples": 12}], []) == {"verdict": "No metric is measured yet: run --mode=evaluate."}
    classifier = newest_result([], [{"step": 1, "accuracy": 0.2}, {"step": 2, "accuracy": 0.6172}, {"step": 3}])
    assert classifier["value"] == "0.617" and "guides" in classifier["verdict"] and "step 2" in classifier["source"]


def test_measurements_are_ordered_by_the_step_of_the_weights(tmp_path):
    (tmp_path / "likelihood.json").write_text(json.dumps({"step": 10, "bits_per_dim": 3.1, "dataset": "digits"}))
    records = [{"step": 20, "precision": 0.5}, {"step": 10, "precision": 0.4}, {"precision": 0.3}]
    (tmp_path / "metrics.json").write_text(json.dumps(records))
    found = collect(RunDir(tmp_path)).measurements()
    assert [(record.get("step"), record.get("precision")) for record in found] == [
        (None, 0.3),
        (10, 0.4),
        (10, None),
        (20, 0.5),
    ]


def test_a_run_without_samples_and_metrics_is_readable(tmp_path):
    write_log(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.sections == ["summary", "curves", "launches", "config", "environment", "reproduce"]
    (card,) = page.blocks("card")
    assert "run --mode=evaluate" in card["result"]["verdict"] and card["picture"] is None and card["facts"]["loss"]
    assert page.size < 2e6 and not page.report["notes"]


def test_calibration_is_counted_on_the_card_and_has_a_table(tmp_path):
    write_log(tmp_path)
    (tmp_path / "calibration").mkdir()
    tested = {"coverage": 0.897, "coverage_standard_error": 0.01, "power": "finds shifts of 0.61 deviations"}
    sentences = {"sparse_mmps": "no error found with 100 examples of 19 samples", "conditional": "mean is too wide"}
    for name, sentence in sentences.items():
        (tmp_path / "calibration" / f"{name}.json").write_text(json.dumps(tested | {"sentence": sentence}))
    page = Page(write_report(tmp_path))
    (card,) = page.blocks("card")
    assert card["facts"]["calibration"] == "2 tested, errors found in 1"
    (table,) = [each for each in page.blocks("table") if "measurement" in each["caption"]]
    assert sorted(row[:3] for row in table["rows"]) == [
        [name, sentence, "0.897 ± 0.010"] for name, sentence in sorted(sentences.items())
    ]
    assert "calibration" in page.sections


@pytest.mark.thorough
def test_a_long_log_stays_below_two_megabytes(tmp_path):
    write_run(tmp_path)
    line = {name: 0.1 for name in simulated_lines(50, 50).__next__()}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 200_001):
            file.write(json.dumps(line | {"step": step, "loss": 1 / step}) + "\n")
    page = Page(write_report(tmp_path))
    assert page.size < 2e6
    (loss,) = page.charts[0]["series"]
    assert len(loss["x"]) == 600 and loss["high"][0] == 1 and loss["low"][-1] == 5e-6
    assert page.curves["runs"][0]["seconds"][-1] == 20_000


def test_an_empty_directory_and_a_missing_one_give_a_page(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        page = Page(write_report(directory))
        assert page.sections == ["summary", "curves"]
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
    assert page.num_scripts == 2 and not page.loaded and "img" not in page.tags
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
    assert sum(map(len, written.images)) < 5e6 / 15
    assert "after 40 training steps" in written.frames[0]["captions"]
    assert "of 40 pictures are in this file." in written.text


def test_metrics_have_names_and_directions(tmp_path):
    write_run(tmp_path)
    page = Page(write_report(tmp_path))
    (metrics,) = [table for table in page.blocks("table") if table["kind"] == "numbers"]
    assert "Frechet distance, lower is better" in metrics["header"] and "frechet_distance, lower" not in page.text
    assert metrics["better"][metrics["header"].index("Frechet distance, lower is better")] == "lower"
    assert "Frechet distance, frechet_distance in files" in page.text
    likelihood = dict(zip(metrics["header"], metrics["rows"][1], strict=True))
    assert likelihood["bits per dimension, lower is better"] == "3.21 ± 0.02"
    assert likelihood["decoder (bits per dimension)"] == "0.3" and likelihood["reference"] == "digits:test"


def test_runs_are_compared(tmp_path):
    write_run(tmp_path / "a" / "run")
    write_log(tmp_path / "b" / "run", num_steps=800)
    write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.sections == ["warnings", "metrics", "states", "curves", "config"]
    assert [series["label"] for series in page.charts[0]["series"]] == ["run", "run (2)"]
    assert page.blocks("notes")[0] == ["The data differ (data.json): losses and metrics cannot be compared."]
    (config,) = [table for table in page.blocks("table") if table["caption"] == "Settings in which the runs differ"]
    assert config["rows"] == [["training.num_steps", "1000", "800"]]


def compared(tmp_path, changes=None):
    """The page of two runs; changes: settings of the second run."""
    for name in "ab":
        write_run(tmp_path / name)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    for name, value in (changes or {}).items():
        group, _, last = name.partition(".")
        config[group][last] = value
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    return Page(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, []),
        ({"data.split": "test", "data.workers": 2}, ["The data differ (data.split): "]),
        ({"diffusion.prediction": "v"}, ["The objectives differ (diffusion.prediction): "]),
        ({"sampling.seed": 1, "sampling.steps": 7}, ["The noise of the samples differ (sampling.seed): "]),
        ({"optimizer.learning_rate": 1e-5}, []),
    ],
)
def test_a_comparison_warns_where_runs_cannot_be_compared(tmp_path, changes, warned):
    page = compared(tmp_path, changes)
    notes = [note for notes in page.blocks("notes") for note in notes if "differ" in note]
    assert len(notes) == len(warned) and all(map(str.startswith, notes, warned))


def test_samples_of_the_same_step_are_side_by_side(tmp_path):
    (frames,) = compared(tmp_path).frames
    assert frames["names"] == ["a", "b"] and len(frames["images"]) == 4
    assert all(len(drawn) == 2 for drawn in frames["images"])
    for path in (tmp_path / "b" / "samples").glob("train_step*.png"):
        path.rename(path.with_name(path.name.replace("0.png", "1.png")))
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    (frames,) = Page(tmp_path / "page.html").frames
    assert frames["captions"] == ["after 1,000 and 1,001 training steps"]


def test_a_comparison_leaves_out_sections_with_invalid_values(tmp_path):
    for name in "ab":
        write_log(tmp_path / name)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1000, "loss": 10**400}) + "\n")
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.sections == ["states", "config"] and "Curves is left out, because a file holds" in page.text


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
    assert caught.value.code == 2 and "is not a directory" in capsys.readouterr().err


# ---- Parts


def test_intervals_have_their_mean_lowest_and_highest_value():
    series = make_series(np.arange(12.0), np.array([0, 1, 5, 3, 4, 5, 9, 7, 8, 9, 10, 11.0]), max_points=4)
    assert series["x"] == [1, 4, 7, 10]
    assert series["mean"] == [2, 4, 8, 10]
    assert series["low"] == [0, 3, 7, 9] and series["high"] == [5, 5, 9, 11]


def test_other_values_of_the_log_have_charts_of_their_own():
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0, "frechet_distance": 3.0, "note": "x"}]
    charts = training_charts({"run": lines})
    assert [chart["title"] for chart in charts] == ["Loss", "frechet distance"]
    assert charts[0]["series"][0]["x"] == [1, 2] and charts[0]["series"][0]["mean"] == [2, 1]


def test_a_line_has_the_name_that_files_and_tensorboard_use():
    line = {"step": 1, "loss_q1": 1.0, "images_per_second": 5.0, "learning_rate": 1e-3, "frechet_distance": 3.0}
    labels = [series["label"] for chart in training_charts({"run": [line]}) for series in chart["series"]]
    assert labels == ["loss_q1: least noise", "learning_rate", "images_per_second", "frechet_distance"]


def test_the_clock_of_a_run_adds_the_seconds_of_its_steps():
    lines = [{"step": 10, "step_seconds": 0.5}, {"step": 20, "step_seconds": 1.0}, {"step": 25, "loss": 1.0}]
    assert run_clock(lines) == {"steps": [10, 20], "seconds": [5, 15]}
    assert run_clock([]) == {"steps": [], "seconds": []}


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
    for text in (
        "1,498 images of digits",
        "1,000 of batch 64",
        "0.11 ± 0.04",
        "3.21 ± 0.02",
        "--config=digits_conditional",
    ):
        assert text in card, text
    card = model_card(of_weights(net, "raw"), tmp_path / "digits", directory)  # the metrics belong to other weights
    assert "These weights have no metrics yet" in card
    card = model_card(net, tmp_path / "x.safetensors", None)  # as for published weights
    assert front_matter(card)["library_name"] == "diffusion_jax"
    assert "## Training" not in card and "network times 0 ..." in card


def test_a_card_has_no_paths_and_its_values_end_no_block(run, tmp_path):
    directory, net = run
    values = json.loads((directory / "config.json").read_text())
    hostile, paths = "x\n```\n---\n<b>\x1b[31m", {name for name, setting in SETTINGS.items() if setting.is_path}
    for name in paths:
        group, _, last = name.rpartition(".")
        (values[group] if group else values)[last] = f"/home/client/{name}"
    values["data"] |= {"dataset": "/home/client/data.py:make", "split": hostile}
    values["diffusion"]["schedule"] = "/home/client/betas.py:make"
    (directory / "config.json").write_text(json.dumps(values))
    record = {"step": 1000, "weights": "ema", "reference": "/home/client/My set:train", "fid": 1.5, "num_samples": 9}
    (directory / "metrics.json").write_text(json.dumps([record]))
    net = dataclasses.replace(
        net, family=hostile, diffusion={**net.diffusion, "schedule": "/home/client/betas.py:make"}
    )
    card = model_card(net, tmp_path / "weights", directory, "mit", "digits", "/home/client/weights")
    assert "client" not in card and card.count("betas.py:make") == 3 and "| My set:train |" in card
    assert front_matter(card)["datasets"] == ["data.py:make"] and "\x1b" not in card
    assert all(line in ("---", "") or line[0] != "-" for line in card.splitlines()) and card.count("\n---\n") == 1
    blocks = re.findall(r"^(`{3,})(\w+)\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)
    assert [kind for _, kind, _ in blocks] == ["python", "text", "sh"] and len(blocks[1][0]) == len(blocks[2][0]) == 4
    assert f"{datetime.datetime.now(datetime.UTC):%Y-}" in card.partition("version ")[2][:60]


def test_published_weights_name_functions_without_folders(tmp_path, monkeypatch):
    file = tmp_path / "client" / "own.py"
    file.parent.mkdir()
    text = "import flax.linen as nn\n\n\nclass Net(nn.Module):\n    @nn.compact\n    def __call__(self, x_t, time):\n"
    file.write_text(f"{text}        return nn.Dense(1)(x_t) + time.mean()\n\n\ndef make(shapes):\n    return Net()\n")
    net = pretrained.from_config(
        {"model": {"kind": f"{file}:make", "dropout": 0.0}, "data": {"image_size": (), "channels": 1, "levels": None}}
    )
    params = net.model.init(jax.random.key(0), np.zeros((1, 1)), np.zeros(1))["params"]
    publish(net.with_params(params), str(tmp_path / "out"), None, "mit", "numbers")
    for path in (tmp_path / "out").rglob("*.*"):
        assert b"own.py:make" in path.read_bytes() and b"client" not in path.read_bytes()
    monkeypatch.chdir(file.parent)
    again = pretrained.load(tmp_path / "out", network=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
