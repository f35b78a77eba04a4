"""Runs that start from other weights: --pretrained and init_from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, errors, pretrained, sampling, schedules, training
from diffusion_jax.images import to_uint8
from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs import train, workdir
from diffusion_jax.runs.workdir import config_from_weights
from helpers.array_configs import array_config, examples, write_arrays
from helpers.configs import tiny_config
from helpers.launcher import launch
from helpers.published_files import SCHEDULER, stored, write_folder
from helpers.work_directories import untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """diffusers' narrow network with three classes."""
    parts = stored("unet_improved_narrow")
    config = json.loads(str(parts[1]["config"])) | {"sample_size": 16}
    return write_folder(
        tmp_path_factory.mktemp("weights") / "narrow",
        config,
        parts[0],
        {**SCHEDULER, "variance_type": "learned_range"},
    )


def small(config, **settings):
    with config.unlocked():
        config.sampling.update(num_samples=2, batch_size=2, steps=3, sampler="ddim")
        for key, value in settings.items():
            group, setting = key.split(".")
            config[group][setting] = value
    return config


@pytest.mark.whole
def test_published_weights_are_sampled_without_a_config(folder, tmp_path):
    """--pretrained gives the same images as pretrained.load and the core. Afterwards the directory stores the weights'
    path."""
    flags = [f"--{name}" for name in ("mode=sample", f"pretrained={folder}", f"workdir={tmp_path / 'out'}")]
    flags += [
        f"--config.sampling.{setting}" for setting in ("num_samples=2", "batch_size=2", "steps=3", "sampler=ddim")
    ]
    code, out, err = launch(*flags)
    assert code == 0 and "from narrow (EMA weights)" in out, err
    (path,) = (tmp_path / "out" / "samples").glob("narrow_ema_ddim3_*.npz")
    with np.load(path) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    np.testing.assert_array_equal(labels, [0, 1])
    net = pretrained.load(folder)
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), i)) for i in range(2)]
    x_T = jnp.stack([jax.random.normal(key_noise, (16, 16, 3)) for key_noise, _ in keys])
    key_steps = jnp.stack([key_steps for _, key_steps in keys])
    short = schedules.respace(net.schedule, 3, "trailing")
    denoiser = net.denoiser(y=jnp.array([0, 1]))
    x = jax.jit(lambda x: sampling.sample(key_steps, short, denoiser, x, sampling.ddim()))(x_T)
    assert abs(images.astype(int) - np.asarray(to_uint8(x)).astype(int)).max() <= 1
    path.unlink()
    code, out, err = launch("--mode=sample", f"--workdir={tmp_path / 'out'}")
    assert code == 0 and "Sampling 2 images from narrow" in out, err
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)


@pytest.mark.whole
def test_training_begins_with_published_weights(folder, tmp_path):
    config = config_from_weights(str(folder))
    config.data.update(dataset="digits", data_dir="")
    config = small(config, **{"training.num_steps": 1, "training.batch_size": 2, "training.sample_every": 0})
    config.training.update(log_every=1, checkpoint_every=1)
    with pytest.raises(errors.UserError, match="the data has 10 classes"):
        train.run(config, tmp_path / "refused")
    net = pretrained.load(folder)
    built = training.build_program(config)
    weights = pretrained.load_initial_weights(config, built.model)
    state = pretrained.set_params(built.init(), built.abstract_state, weights.params)
    for tree in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, tree, net.params)
    leaves = jax.tree.leaves((state.params, state.ema_params))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)  # donated, each once


@pytest.mark.whole
def test_a_run_that_began_with_weights_goes_on_as_any_other(tmp_path):
    """One step, from the weights of another run; sampling then uses the new run's checkpoints."""
    base = {
        "training.num_steps": 1,
        "training.checkpoint_every": 1,
        "training.log_every": 1,
        "training.sample_every": 0,
    }
    config = tiny_config(**base)
    first = untrained(tmp_path / "first", config)
    config.init_from = str(first)
    second = RunDir(tmp_path / "second")
    net = workdir.open_model(config, second)
    begun = pretrained.load_weights(net, config, second, True)
    assert (begun.step, begun.provenance.name) == (0, "first_ema")
    jax.tree.map(np.testing.assert_array_equal, begun.params, pretrained.load(first).params)
    train.run(config, second)
    assert pretrained.load_weights(net, config, second, True).step == 1
    longer = ("--config.training.num_steps=2", "--mode=train")
    code, out, err = launch(f"--pretrained={first}", f"--workdir={tmp_path / 'second'}", *longer)
    assert code == 0 and "Continuing from step 1." in out, err  # the same command resumes
    other = untrained(tmp_path / "other", tiny_config())
    code, _, err = launch("--mode=sample", f"--pretrained={other}", f"--workdir={tmp_path / 'second'}")
    assert code == 2 and "starts a run, but" in err and len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A directory with data.npz, an untrained run of these vectors, and net.safetensors."""
    root = tmp_path_factory.mktemp("weights")
    config = array_config("vectors", write_arrays("vectors", root / "data.npz"))
    untrained(root / "run", config, data.load(config.data))
    pretrained.save_safetensors(pretrained.load(root / "run"), root / "net.safetensors")
    return root


def initial(root, name="run", **overrides):
    config = array_config("vectors", root / "data.npz", **{"init_from": str(root / name), **overrides})
    net = pretrained.load_initial_weights(config, training.model_from_config(config))
    return net, pretrained.from_config(config, normalizations=net.normalizations).find_differences(net)


@pytest.mark.thorough
def test_weights_are_compared_with_the_config(weights, tmp_path):
    net, differences = initial(weights, "net.safetensors", **{"model.dropout": 0.5})  # which changes no weights
    assert not differences and net.normalizations["x"].offset == pytest.approx(examples("vectors").mean(axis=0))
    jax.tree.map(np.testing.assert_array_equal, net.params, pretrained.load(weights / "run").params)
    assert initial(weights, **{"data.levels": 256})[1] == ["levels: None there, 256 here"]
    assert initial(weights, **{"diffusion.prediction": "v"})[1] == ["prediction: 'eps' there, 'v' here"]
    for overrides, words in (
        ({"data.channels": 4}, "data.channels: 3 there, 4 here"),
        ({"model.num_res_blocks": 2}, "model.num_res_blocks: 1 there, 2 here"),
    ):
        with pytest.raises(errors.UserError, match=words):
            initial(weights, **overrides)
    with pytest.raises(pretrained.PretrainedError, match="no such file or folder"):
        initial(weights, "nothing")
    series = array_config("series", "", init_from=str(weights / "run"))
    with pytest.raises(errors.UserError, match="holds weights of models.MLP, and the config describes models.UNet"):
        pretrained.load_initial_weights(series, training.model_from_config(series))
    config = array_config(
        "vectors", weights / "data.npz", init_from=str(weights / "run"), **{"diffusion.prediction": "v"}
    )
    run = RunDir(tmp_path / "none")
    with pytest.raises(errors.UserError, match="was trained for another diffusion"):
        pretrained.load_weights(workdir.open_model(config, run), config, run, True)


@pytest.mark.whole
def test_fine_tuning_measures_its_own_data_and_says_so(weights, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", x=examples("vectors", seed=2) * 3)
    config = array_config(
        "vectors", tmp_path / "other.npz", **{"init_from": str(weights / "run"), "training.num_steps": 2}
    )
    train.run(config, tmp_path / "new")
    out = capsys.readouterr().out
    assert "Note: these weights were trained for other data or another diffusion (x: (data - (" in out
    own = training.stored_normalizations(config, tmp_path / "new")["x"]
    np.testing.assert_allclose(own.offset, 3 * examples("vectors", seed=2).mean(axis=0), rtol=1e-6)
