"""--mode=evaluate on a tiny conditional run with a learned variance."""

import json
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import Denoiser, data, errors, likelihood, pictures, pretrained, run_dir, training
from diffusion_jax.evaluation import ode_likelihood
from helpers.configs import convolutions_config
from helpers.program import evaluate
from helpers.work_directories import untrained

T = 20
OVERRIDES = {
    "diffusion.num_timesteps": T,
    "diffusion.loss": "hybrid",
    "diffusion.variance": "learned_range",
    "model.num_classes": 10,
    "evaluation.num_examples": 10,
    "evaluation.batch_size": 4,
}


def config_with(**overrides):
    return convolutions_config(**{**OVERRIDES, **overrides})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "run", config_with())


def report(directory):
    return json.loads((directory / "likelihood.json").read_text())


def bound_by_hand(config, directory, use_ema=True, split="test", seed=0, clip=True, **options):
    """The same images, batches and keys, through the core alone."""
    built = training.build_program(config)
    params = pretrained.load(directory, ema=use_ema, network=True).params
    source = data.load(ConfigDict({**config.data, "split": split}))

    @jax.jit
    def bound(key, images, labels):
        network = lambda x_t, time: built.model.apply({"params": params}, x_t, time, labels)  # noqa: E731
        denoiser = Denoiser(network, variance="learned_range", clip=clip)
        x_0 = images.astype(np.float32) / 127.5 - 1
        return likelihood.bits_per_dim(key, built.schedule, denoiser, x_0, gray_levels=17, **options)

    found = []
    for batch, places in enumerate([range(0, 4), range(4, 8), [8, 9, 9, 9]]):
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), batch))
        bits, kept = bound(key, *source.read(np.array(places)).values()), min(4, 10 - 4 * batch)
        found.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], bits))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


@pytest.mark.whole
def test_the_report_agrees_with_the_bound_of_the_core(trained, monkeypatch):
    drawn, draw = [], pictures.draw_rate_distortion
    monkeypatch.setattr(pictures, "draw_rate_distortion", lambda *given: drawn.append(given) or draw(*given))
    evaluate(config_with(), trained)
    expected, got = bound_by_hand(config_with(), trained), report(trained)
    assert got["num_examples"] == 10 and got["weights"] == "ema" and got["step"] == 1 and got["levels"] == 17
    np.testing.assert_allclose(got["bits_per_dim"], expected.total.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["bits_per_dim_standard_error"], expected.total.std(ddof=1) / 10**0.5, rtol=1e-3)
    np.testing.assert_allclose(got["decoder"], expected.decoder.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["prior"] + got["transitions"] + got["decoder"], got["bits_per_dim"], rtol=1e-6)
    with np.load(trained / "likelihood.npz") as arrays:
        assert (arrays["count"] == 10).all() and arrays["example_total"].shape == (10,)
        for name in ("vlb", "mse", "x_0_mse"):
            values = getattr(expected, name)
            np.testing.assert_allclose(arrays[name], values.mean(0), rtol=1e-3)
            np.testing.assert_allclose(
                arrays[f"{name}_standard_error"], values.std(0, ddof=1) / 10**0.5, rtol=2e-2, atol=1e-6
            )
        rate, distortion = likelihood.rate_distortion(expected.prior.mean(), arrays["vlb"], arrays["x_0_mse"])
        np.testing.assert_allclose(arrays["rate"], rate, rtol=1e-4)
        np.testing.assert_allclose(arrays["distortion"], distortion, rtol=1e-4)
        np.testing.assert_array_equal(drawn[0][0], arrays["rate"])  # the picture is in bits, too
    assert not list(trained.glob(".likelihood_*")) and not list(trained.glob("*partial*"))
    evaluate(config_with(**{"evaluation.use_ema": False}), trained)
    raw = report(trained)
    assert raw["weights"] == "raw" and raw["bits_per_dim"] != got["bits_per_dim"]


@pytest.mark.whole
def test_the_options_reach_the_core(trained):
    """Another split, seed, cdf and clip; and the ODE with both dequantizations."""
    options = {"split": "train", "seed": 3, "cdf": "tanh", "clip": False}
    evaluate(config_with(**{f"evaluation.{key}": value for key, value in options.items()}), trained)
    got = report(trained)
    expected = bound_by_hand(config_with(), trained, **options)
    np.testing.assert_allclose(got["bits_per_dim"], expected.total.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["decoder"], expected.decoder.mean(), rtol=1e-5)
    for other, part in (({"seed": 0}, "total"), ({"cdf": "exact"}, "decoder"), ({"clip": True}, "total")):
        without = getattr(bound_by_hand(config_with(), trained, **{**options, **other}), part).mean()
        assert abs(without / getattr(expected, part).mean() - 1) > 1e-4, other
    found = {}
    for dequantization in ("uniform", "variational"):
        ode = {"ode": True, "ode_tolerance": 1e-2, "ode_dequantization": dequantization, "num_examples": 4, "strata": 1}
        evaluate(config_with(**{f"evaluation.{key}": value for key, value in ode.items()}), trained)
        found[dequantization] = report(trained)["ode_bits_per_dim"]
    assert abs(found["uniform"] - found["variational"]) > 0.01
    with np.load(trained / "likelihood.npz") as arrays:  # of one stratum
        assert arrays["count"].sum() == 4 * 3 and arrays["count"][0] == 4
        assert np.isfinite(arrays["rate"]).all() and (np.diff(arrays["rate"]) <= 0).all()


@pytest.mark.whole
def test_measured_batches_are_kept_if_writing_fails_and_reused_only_with_equal_options(trained, monkeypatch):
    """After a full disk at the plots, the batches are not measured again; another seed starts from the beginning."""

    def full(*_):
        raise OSError(28, "No space left on device")

    made, save = [], run_dir.ChunkStore.save
    monkeypatch.setattr(run_dir.ChunkStore, "save", lambda self, i, **arrays: (made.append(i), save(self, i, **arrays)))
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_jax.pictures.draw_bound_terms", full)
        with pytest.raises(OSError, match="No space"):
            evaluate(config_with(**{"evaluation.strata": 2}), trained)
    evaluate(config_with(**{"evaluation.strata": 2, "evaluation.seed": 1}), trained)
    assert made == [0, 1, 2, 0, 1, 2]
    evaluate(config_with(**{"evaluation.strata": 2}), trained)
    assert made == [0, 1, 2, 0, 1, 2] and not list(trained.glob(".likelihood_*"))


@pytest.mark.whole
def test_what_cannot_be_evaluated_is_refused(trained, monkeypatch):
    monkeypatch.setitem(ode_likelihood.log_density.__kwdefaults__, "max_steps", 3)
    failing = {"ode": True, "num_examples": 4, "strata": 1}
    for options, words in (
        ({"strata": T}, f"strata, .*, got {T}"),
        (failing, "did not converge for 4 of 4 images; try a larger"),
    ):
        with pytest.raises(errors.UserError, match=words):
            evaluate(config_with(**{f"evaluation.{key}": value for key, value in options.items()}), trained)
    monkeypatch.delitem(sys.modules, "diffusion_jax.evaluation.ode_likelihood", raising=False)
    monkeypatch.delattr("diffusion_jax.evaluation.ode_likelihood", raising=False)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(errors.UserError, match=r"needs diffrax .*pip install '\.\[ode\]'"):
        evaluate(config_with(**{"evaluation.ode": True}), trained)
