"""Parts of report.html: thinned curves, pictures of a given size, and commands."""

import base64
import json
import shlex

import numpy as np
import pytest

from diffusion_jax import cli
from diffusion_jax.config import experiment, override
from diffusion_jax.report import commands
from diffusion_jax.report.charts import make_series, training_charts
from diffusion_jax.report.gallery import Budget
from diffusion_jax.report.markup import element, json_script, table
from diffusion_jax.runs.workdir import to_dict


def test_intervals_have_their_mean_lowest_and_highest_value():
    series = make_series("x", np.arange(12.0), np.array([0, 1, 5, 3, 4, 5, 9, 7, 8, 9, 10, 11.0]), max_points=4)
    assert series["x"] == [1, 4, 7, 10]
    assert series["mean"] == [2, 4, 8, 10]
    assert series["low"] == [0, 3, 7, 9] and series["high"] == [5, 5, 9, 11]
    assert series["values"] == 12


def test_other_values_of_the_log_have_charts_of_their_own():
    charts = training_charts([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0, "frechet_distance": 3.0, "note": "x"}])
    assert [chart["title"] for chart in charts] == ["Loss", "frechet distance"]
    assert charts[0]["series"][0]["x"] == [1, 2] and charts[0]["series"][0]["mean"] == [2, 1]


def test_elements_escape_text_and_attributes():
    written = element("p", "<b>&", element("i", '"'), title='"><script>', data_x_y=1, hidden=True, id=None)
    assert written == '<p title="&quot;&gt;&lt;script&gt;" data-x-y="1" hidden>&lt;b&gt;&amp;<i>&quot;</i></p>'
    assert "<script" not in table("<script>", ["<script>"], [["<script>", "<script>"]])
    written = json_script("data", ["</script>"])
    assert written.count("</script>") == 1
    assert json.loads(written.partition(">")[2].rpartition("<")[0]) == ["</script>"]


def test_pictures_have_at_most_their_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    budget = Budget(100_000)
    picture = budget.embed(noise, "noise", side=150)
    assert (picture.width, picture.height, picture.caption) == (150, 100, "noise")
    assert budget.left == 100_000 - len(base64.b64decode(picture.src.partition("base64,")[2]))
    assert Budget(10).embed(noise, "noise") is None
    small = budget.embed(noise[:4, :4], "small")
    assert (small.width, small.height) == (4, 4) and small.src.startswith("data:image/png")


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
    command = commands.train_command(config)
    assert f"--config={name} " in command
    mode = "train_classifier" if "classifier" in name else "train"
    assert parsed(command, mode) == to_dict(config)
