"""EDM's weights: the networks against float64 NumPy, EDM's scaling and sampler, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import pretrained, sampling, schedules
from diffusion_jax.pretrained import PretrainedError
from helpers.edm_networks import ADM, DDPMPP, NCSNPP, Network
from helpers.published_files import worst
from helpers.torch_files import edm_pickle


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


KINDS = {"adm": ADM, "ddpmpp": DDPMPP, "ncsnpp": NCSNPP}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function of a kind that returns (reference, weights, model) of a network with a null label."""

    @functools.cache
    def load(kind):
        path = tmp_path_factory.mktemp(kind) / "edm.pkl"
        reference, weights = write(path, KINDS[kind])
        net = pretrained.load(path)
        assert not path.with_name("marker").exists()
        return reference, weights, net

    return load


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.thorough] * (kind != "ddpmpp")) for kind in KINDS]
)
def test_network_agrees_with_numpy(load, kind):
    reference, weights, net = load(kind)
    x, time, y = inputs(ADM)
    run = jax.jit(net.model.apply)
    assert net.model.null_label == 5
    for labels, theirs in ((y, y), (np.array([5, 5]), None)):
        ours = run({"params": net.params}, x, time, labels)
        theirs = reference(weights, np.moveaxis(x, -1, 1), time, theirs)
        assert worst(np.moveaxis(ours, -1, 1), theirs) < 3e-6


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_agrees_with_numpy(load, tmp_path, kind):
    """The derivative along random weights of sum(u network(x)), as the reference's central difference has it."""
    reference, weights, net = load(kind)
    x, time, y = inputs(ADM)
    path = tmp_path / "direction.pkl"
    arguments = reference.arguments
    constants = ("resample_filter", "freqs")
    direction = {name: value for name, value in reference.draw(seed=3).items() if not name.endswith(constants)}
    arrays = {f"model.{name}": direction.get(name, value) for name, value in weights.items()}
    path.write_bytes(edm_pickle("EDMPrecond", arrays, arguments, tmp_path / "marker"))
    along = pretrained.load(path).params
    u = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda params: (u * net.model.apply({"params": params}, x, time, y)).sum()))(
        net.params
    )
    products = jax.tree.map(lambda a, b: float(np.vdot(np.float64(a), np.float64(b))), gradients, along)

    def output(step):
        moved = {name: value + step * np.float64(direction.get(name, 0)) for name, value in weights.items()}
        return (np.moveaxis(u, -1, 1) * reference(moved, np.moveaxis(x, -1, 1), time, y)).sum()

    parts = jax.tree.leaves(products)
    derivative = (output(1e-5) - output(-1e-5)) / 2e-5
    assert abs(sum(parts) - derivative) < 1e-5 * np.linalg.norm(parts)


@pytest.mark.thorough
@pytest.mark.parametrize("given", [ADM, DDPMPP | {"channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [4]}])
def test_network_without_classes_agrees_with_numpy(tmp_path, given):
    arguments = given | {"label_dim": 0, "augment_dim": 0, "img_channels": 1, "label_dropout": 0}
    reference, weights = write(tmp_path / "edm.pkl", arguments)
    net = pretrained.load(tmp_path / "edm.pkl")
    x, time, _ = inputs(arguments)
    ours = jax.jit(net.model.apply)({"params": net.params}, x, time)
    assert worst(np.moveaxis(ours, -1, 1), reference(weights, np.moveaxis(x, -1, 1), time)) < 3e-6


@pytest.mark.thorough
def test_denoiser_has_edm_s_scaling_and_sampler(load):
    """D(y; s) = c_skip y + c_out F(c_in y; log(s) / 4), sampled by Heun's method as EDM's equations have it."""
    reference, weights, net = load("adm")
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


@pytest.mark.parametrize("kind", ["adm", "ddpmpp"])
def test_config_of_the_weights_has_their_sampler(load, kind):
    *_, net = load(kind)
    settings = pretrained.config_settings(net)
    assert settings["sampling"] == {"clip": False, "sampler": "heun", "steps": 18, "spacing": "karras"}
    again = pretrained.from_config(settings)
    assert again.model == net.model and not again.find_differences(net)


REFUSED = {
    "is a VPPrecond, whose preconditioning": ("VPPrecond", ADM, {}),
    "the network OtherUNet is not supported": ("EDMPrecond", ADM | {"model_type": "OtherUNet"}, {}),
    "the arguments color of DhariwalUNet are not known": ("EDMPrecond", ADM | {"color": 1}, {}),
    "num_blocks=1000000 is more than": ("EDMPrecond", ADM | {"num_blocks": 10**6}, {}),
    "channel_mult_emb=2": ("EDMPrecond", ADM | {"channel_mult_emb": 2}, {}),
    "fewer than 128 channels": ("EDMPrecond", ADM | {"model_channels": 64}, {}),
    "layers of fewer": ("EDMPrecond", DDPMPP | {"model_channels": 64, "channel_mult": [2, 2]}, {}),
    "embedding_type=fourier, .*is neither DDPM.. nor NCSN..": (
        "EDMPrecond",
        DDPMPP | {"embedding_type": "fourier"},
        {},
    ),
    "is another filter": (
        "EDMPrecond",
        ADM,
        {"enc.4x4_down.conv0.resample_filter": np.float32([[[[1, 3, 3, 1]] * 4]]) / 64},
    ),
    "1 are unexpected": ("EDMPrecond", ADM, {"extra.weight": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_networks_are_refused(load, tmp_path, words):
    kind, arguments, changes = REFUSED[words]
    weights = load("adm")[1] | changes
    arrays = {f"model.{name}": value for name, value in weights.items()}
    (tmp_path / "edm.pkl").write_bytes(edm_pickle(kind, arrays, arguments, tmp_path / "marker"))
    with pytest.raises(PretrainedError, match=words):
        pretrained.load(tmp_path / "edm.pkl")
