"""`init_from` of runs on data that are not images: the same network, its normalization, and new data."""

import jax
import numpy as np
import pytest

from diffusion_jax import data, errors, pretrained, training
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import train, trained_model, workdir
from helpers.array_configs import array_config, examples, write_arrays
from helpers.work_directories import untrained


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with data.npz, an untrained run of these vectors, and net.safetensors."""
    root = tmp_path_factory.mktemp("weights")
    config = array_config("vectors", write_arrays("vectors", root / "data.npz"))
    untrained(root / "run", config)
    source = data.load(config.data)
    workdir.check_data(source, RunDir(root / "run"), data.find_normalizations(config.data, source))
    pretrained.save_safetensors(pretrained.load(root / "run"), root / "net.safetensors")
    return root


def initial(root, name="run", **overrides):
    config = array_config("vectors", root / "data.npz", **{"init_from": str(root / name), **overrides})
    return trained_model.load_initial_weights(config, training.model_from_config(config))


def test_weights_of_vectors_are_compared_with_the_config(weights):
    net, differences = initial(weights, "net.safetensors")
    assert not differences and net.normalizations["x"].offset == pytest.approx(examples("vectors").mean(axis=0))
    jax.tree.map(np.testing.assert_array_equal, net.params, pretrained.load(weights / "run").params)
    assert initial(weights, **{"data.levels": 256})[1] == ["data.levels: None there, 256 here"]
    assert initial(weights, **{"diffusion.prediction": "v"})[1] == ["prediction: 'eps' there, 'v' here"]
    for overrides, words in (
        ({"data.channels": 4}, "input channels: 3 there, 4 here"),
        ({"model.num_res_blocks": 2}, "model.num_res_blocks: 1 there, 2 here"),
        ({"model.condition_features": 2}, "model.condition_features: 0 there, 2 here"),
    ):
        with pytest.raises(errors.UserError, match=words):
            initial(weights, **overrides)
    series = array_config("series", "", init_from=str(weights / "run"))
    with pytest.raises(errors.UserError, match="holds weights of models.MLP, and the config describes models.UNet"):
        trained_model.load_initial_weights(series, training.model_from_config(series))


@pytest.mark.whole
def test_fine_tuning_measures_its_own_data_and_says_so(weights, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", x=examples("vectors", seed=2) * 3)
    config = array_config(
        "vectors", tmp_path / "other.npz", **{"init_from": str(weights / "run"), "training.num_steps": 2}
    )
    train.run(config, tmp_path / "new")
    out = capsys.readouterr().out
    assert "Note: the data are scaled by their own constants, not those of the weights (x: (data - (" in out
    own = training.stored_normalizations(config, tmp_path / "new")["x"]
    np.testing.assert_allclose(own.offset, 3 * examples("vectors", seed=2).mean(axis=0), rtol=1e-6)
