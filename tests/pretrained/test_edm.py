"""EDM's weights: the networks against float64 NumPy, EDM's scaling and sampler, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained, sampling, schedules
from diffusion_jax.pretrained import PretrainedError
from helpers.edm_networks import Network
from helpers.published_files import worst
from helpers.torch_files import edm_pickle

ADM = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 5,
    "use_fp16": False,
    "model_type": "DhariwalUNet",
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.1,
    "label_dropout": 0.1,
    "sigma_data": 0.4,
}


def write(path, arguments, **changes):
    """Writes a pickle with drawn weights; returns (reference, weights)."""
    reference = Network(arguments["model_type"], arguments)
    weights = reference.draw() | changes
    arrays = {f"model.{name}": value for name, value in weights.items()}
    path.write_bytes(edm_pickle("EDMPrecond", arrays, arguments, path.with_name("marker")))
    return reference, weights


def inputs(arguments):
    generator = np.random.default_rng(1)
    shape = (2, arguments["img_resolution"], arguments["img_resolution"], arguments["img_channels"])
    y = np.array([3, 1]) if arguments["label_dim"] else None
    return generator.standard_normal(shape).astype(np.float32), np.array([-1.2, 0.9], np.float32), y


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """(reference, weights, model) of ADM with a null label, a vector of zeros."""
    path = tmp_path_factory.mktemp("edm") / "edm.pkl"
    reference, weights = write(path, ADM)
    net = pretrained.load(path)
    assert not path.with_name("marker").exists()
    return reference, weights, net


def test_network_agrees_with_numpy(adm):
    reference, weights, net = adm
    x, time, y = inputs(ADM)
    run = jax.jit(net.model.apply)
    assert net.model.null_label == 5
    for labels, theirs in ((y, y), (np.array([5, 5]), None)):
        ours = run({"params": net.params}, x, time, labels)
        theirs = reference(weights, np.moveaxis(x, -1, 1), time, theirs)
        assert worst(np.moveaxis(ours, -1, 1), theirs) < 3e-6


def test_network_without_classes_agrees_with_numpy(tmp_path):
    arguments = ADM | {"label_dim": 0, "augment_dim": 0, "img_channels": 1, "label_dropout": 0}
    reference, weights = write(tmp_path / "edm.pkl", arguments)
    net = pretrained.load(tmp_path / "edm.pkl")
    x, time, _ = inputs(arguments)
    ours = jax.jit(net.model.apply)({"params": net.params}, x, time)
    assert worst(np.moveaxis(ours, -1, 1), reference(weights, np.moveaxis(x, -1, 1), time)) < 3e-6


def test_denoiser_has_edm_s_scaling_and_sampler(adm):
    """D(y; s) = c_skip y + c_out F(c_in y; log(s) / 4), sampled by Heun's method as EDM's equations have it."""
    reference, weights, net = adm
    x, _, y = inputs(ADM)

    def denoise(noisy, sigma):  # [N, C, H, W], in EDM's units
        c_in, c_skip = 1 / np.sqrt(sigma**2 + 0.16), 0.16 / (sigma**2 + 0.16)
        output = reference(weights, c_in * noisy, np.full(2, np.log(sigma) / 4), y)
        return c_skip * noisy + sigma * 0.4 * c_in * output

    sigma = 0.7
    level = schedules.edm().at(jnp.float32(np.log(sigma) / 4), x)
    ours = jax.jit(lambda denoiser, x_t, level: denoiser(x_t, level))(
        net.denoiser(y=y), x * np.asarray(level.alpha), level
    )
    theirs = denoise(np.moveaxis(x, -1, 1).astype(np.float64), sigma)
    assert worst(np.moveaxis(ours.x_0, -1, 1), theirs) < 1e-5

    sampler, schedule = net.configure(net.denoiser(y=y))
    assert isinstance(sampler, sampling.heun) and schedule.num_timesteps == 18
    np.testing.assert_allclose(schedule.alpha_bar, schedules.edm_steps(18).alpha_bar, rtol=1e-9)
    # The last three steps, from the same noisy images.
    rho = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    steps = [*rho[-3:], 0.0]
    state = np.moveaxis(x, -1, 1) * steps[0]
    theirs = state.astype(np.float64)
    for now, then in itertools.pairwise(steps):
        slope = (theirs - denoise(theirs, now)) / now
        moved = theirs + (then - now) * slope
        if then:
            moved = theirs + (then - now) * (slope + (moved - denoise(moved, then)) / then) / 2
        theirs = moved
    short = schedules.respace(schedule, [0, 1, 2])
    x_t = np.moveaxis(state, 1, -1) * np.sqrt(schedule.alpha_bar[2])
    run = jax.jit(sampling.sample, static_argnums=4)
    ours = run(jax.random.key(0), short, net.denoiser(y=y), jnp.float32(x_t), sampler)
    assert worst(np.moveaxis(ours, -1, 1), theirs) < 1e-4


def test_config_of_the_weights_has_their_sampler(adm):
    *_, net = adm
    settings = pretrained.config_settings(net)
    assert settings["sampling"] == {"clip": False, "sampler": "heun", "steps": 18, "spacing": "karras"}
    again = pretrained.from_config(settings)
    assert again.model == net.model and not again.find_differences(net)


REFUSED = {
    "is a VPPrecond, whose preconditioning": ("VPPrecond", ADM, {}),
    "the network OtherUNet is not supported": ("EDMPrecond", ADM | {"model_type": "OtherUNet"}, {}),
    "the arguments color of DhariwalUNet are not known": ("EDMPrecond", ADM | {"color": 1}, {}),
    "channel_mult_emb=2": ("EDMPrecond", ADM | {"channel_mult_emb": 2}, {}),
    "fewer than 128 channels": ("EDMPrecond", ADM | {"model_channels": 64}, {}),
    "is another filter": ("EDMPrecond", ADM, {"enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 4, 4), "f4") / 16}),
    "1 are unexpected": ("EDMPrecond", ADM, {"extra.weight": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_networks_are_refused(tmp_path, words):
    kind, arguments, changes = REFUSED[words]
    weights = Network("DhariwalUNet", ADM).draw() | changes
    arrays = {f"model.{name}": value for name, value in weights.items()}
    (tmp_path / "edm.pkl").write_bytes(edm_pickle(kind, arrays, arguments, tmp_path / "marker"))
    with pytest.raises(PretrainedError, match=words):
        pretrained.load(tmp_path / "edm.pkl")
