"""The model card of converted weights."""

import json

import pytest
import yaml

from diffusion_jax import pretrained
from diffusion_jax.report.model_card import model_card
from helpers.simulated_runs import write_run


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def run(tmp_path):
    """(a run at step 1000, its description)."""
    directory = tmp_path / "run"
    write_run(directory)
    (directory / "checkpoints" / "1000").mkdir()
    (directory / "checkpoints" / "1000" / "digests.json").write_text("{}")
    return directory, pretrained.describe(directory)


def test_a_card_is_filled_from_the_run(run, tmp_path):
    directory, description = run
    card = model_card(description, tmp_path / "digits", directory, ema=True)
    found = front_matter(card)
    assert found["license"] == "unknown" and found["library_name"] == "diffusers" and found["datasets"] == ["digits"]
    for text in ("1,498 examples", "1,000 of batch 64", "0.1067 ± 0.04", "3.21 ± 0.02", "--config=digits_conditional"):
        assert text in card, text


def test_metrics_of_other_weights_are_left_out(run, tmp_path):
    directory, description = run
    card = model_card(description, tmp_path / "digits", directory, ema=False)
    assert "Nothing was measured of these weights" in card


def test_a_card_of_published_weights_has_no_run(run, tmp_path):
    card = model_card(run[1], tmp_path / "x.safetensors", None, ema=True)
    assert front_matter(card)["library_name"] == "diffusion_jax"
    assert "## Training" not in card and "network times 0 ..." in card


def test_names_are_text(run, tmp_path):
    directory, description = run
    (record,) = json.loads((directory / "metrics.json").read_text())
    (directory / "metrics.json").write_text(json.dumps([record | {"reference": "a|b <script>\n# c: ---"}]))
    card = model_card(description, tmp_path / "x", directory, ema=True)
    assert "<script>" not in card.replace("\\<script\\>", "") and "a\\|b" in card
    assert front_matter(card)["license"] == "unknown"
