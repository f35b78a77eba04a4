"""The model card of converted weights."""

import dataclasses
import json

import pytest
import yaml

from diffusion_jax import pretrained
from diffusion_jax.provenance import Provenance
from diffusion_jax.report.model_card import model_card
from helpers.simulated_runs import write_run


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
    for text in ("1,498 examples", "1,000 of batch 64", "0.1067 ± 0.04", "3.21 ± 0.02", "--config=digits_conditional"):
        assert text in card, text
    card = model_card(of_weights(net, "raw"), tmp_path / "digits", directory)  # the metrics are of other weights
    assert "Nothing was measured of these weights" in card
    card = model_card(net, tmp_path / "x.safetensors", None)  # as of published weights
    assert front_matter(card)["library_name"] == "diffusion_jax"
    assert "## Training" not in card and "network times 0 ..." in card


def test_names_are_text(run, tmp_path):
    directory, net = run
    (record,) = json.loads((directory / "metrics.json").read_text())
    (directory / "metrics.json").write_text(json.dumps([record | {"reference": "a|b <script>\n# c: ---"}]))
    card = model_card(net, tmp_path / "x", directory)
    assert "<script>" not in card.replace("\\<script\\>", "") and "a\\|b" in card
    assert front_matter(card)["license"] == "unknown"
