"""Which stored configs are those of the same run, across versions."""

import json

import pytest

from diffusion_jax import config, errors
from diffusion_jax.runs import workdir


@pytest.mark.parametrize("loss", ["simple", "classify"])
def test_a_stored_config_without_a_newer_leaf_was_trained_with_its_default(loss, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "committed_steps", lambda _: [1])
    same = config.resolve({"diffusion": {"loss": loss}})
    stored = workdir.to_dict(same)
    for name in ("kind", "padding", "condition_features", "condition_channels", "condition_dropout"):
        stored["model"].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert config.resolve(stored) == same
    workdir.check_identity(same, tmp_path)
    other = config.resolve({"diffusion": {"loss": loss}, "model": {"padding": "periodic"}})
    with pytest.raises(errors.UserError, match=r"\(model.padding: 'zeros' there, 'periodic' here\)"):
        workdir.check_identity(other, tmp_path)
