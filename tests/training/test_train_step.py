"""The train step alone, with one-parameter networks whose losses are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, losses, schedules, timesteps, training
from diffusion_jax.images import to_model_range
from diffusion_jax.training.batches import Examples
from diffusion_jax.training.state import QUARTERS, quarter_averages
from diffusion_jax.training.step import make_objective
from helpers.configs import a_batch, classifier_config, tiny_config
from helpers.recorded_steps import floats, recorded, schedule_of


def test_every_step_draws_anew_and_a_relaunch_draws_the_same():
    """A step's noise and timesteps are not repeated in the next step; both depend only on the seed and the step."""
    config = tiny_config()
    network, state, run = recorded(config, lambda w, x_t, time: w * x_t)
    first = state
    for _ in range(2):
        state, _ = run(state, {"x": np.zeros((8, 8, 8, 1), np.float32)})
    noise = [np.ravel(call.x_t / np.std(call.x_t, axis=(1, 2, 3), keepdims=True)) for call in network.calls]
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / np.sqrt(noise[0].size)
    assert (network.calls[0].time != network.calls[1].time).any()
    assert all(call.train is True for call in network.calls)
    run(first.replace(step=jnp.int32(1)), {"x": np.zeros((8, 8, 8, 1), np.float32)})
    np.testing.assert_array_equal(network.calls[2].x_t, network.calls[1].x_t)


@pytest.mark.parametrize("loss", ["simple", "classify"])
def test_no_key_is_used_twice(loss):
    """Flips, timesteps, noise, dropout and an upsampler's noise each have their own key (jax's checker, by tracing)."""
    overrides = {"data.random_flip": True, "data.low_resolution": 4, "diffusion.conditioning_noise": 0.5}
    config = tiny_config(**overrides) if loss == "simple" else classifier_config(**{"data.random_flip": True})

    def output(w, x_t, time):
        drawn = jax.random.normal(network.calls[-1].dropout, x_t.shape[:3] + (1,))
        return w * drawn if loss == "simple" else w * drawn[:, 0, 0] * jnp.ones(10)

    network, state, run = recorded(config, output, num_classes=10 if loss == "classify" else 0)
    with jax.debug_key_reuse(True):
        jax.eval_shape(jax.jit(run), state, a_batch(config))


@pytest.mark.parametrize(
    "num_timesteps", [7, 10, *(pytest.param(n, marks=pytest.mark.thorough) for n in (4, 5, 6, 1000))]
)
def test_quarters_of_a_number_of_timesteps_that_4_does_not_divide(num_timesteps):
    """Timestep t is in the quarter of t / T, so that every timestep is in one quarter and the quarters' sizes differ by at
    most one."""
    t = np.arange(num_timesteps)
    averages = quarter_averages(
        {"t": jnp.asarray(t), "loss": jnp.asarray(10.0**4 + t), "importance": jnp.ones(len(t))},
        schedules.from_betas(schedules.betas("linear", num_timesteps)),
    )
    in_quarters = [[i for i in t if quarter / 4 <= i / num_timesteps < (quarter + 1) / 4] for quarter in range(4)]
    for average, members in zip(averages.values(), in_quarters, strict=True):
        assert float(average.count) == len(members) and float(average.total) == sum(10.0**4 + i for i in members)
    sizes = [len(members) for members in in_quarters]
    assert sum(sizes) == num_timesteps and max(sizes) - min(sizes) <= 1


def test_quarters_of_a_path_are_bands_of_the_log_snr():
    schedule = schedules.from_path(schedules.edm(), [-1.0, 0.0, 1.0])
    log_snr = np.array([9.0, 4.1, 3.9, 0.1, -0.1, -3.9, -4.1])
    examples = {"t": jnp.asarray(log_snr / -8, jnp.float32), "loss": jnp.arange(7.0), "importance": jnp.ones(7)}
    means = [float(average.compute()) for average in quarter_averages(examples, schedule).values()]
    assert means == [0.5, 2.5, 4.5, 6.0]


def test_rescaled_network_times_begin_at_0():
    """OpenAI's --rescale_timesteps: t * 1000 / T, for the 0-based t; without it t itself."""
    diffusion = {"diffusion.num_timesteps": 4, "diffusion.rescale_timesteps": True}
    np.testing.assert_array_equal(schedule_of(tiny_config(**diffusion)).timesteps, [0, 250, 500, 750])
    diffusion["diffusion.rescale_timesteps"] = False
    np.testing.assert_array_equal(schedule_of(tiny_config(**diffusion)).timesteps, [0, 1, 2, 3])


def test_the_rate_the_norms_and_the_average_are_those_of_this_step():
    """A loss with a known gradient in one parameter, in the fifth step: Adam's update, both norms, the EMA with warm-up."""
    config = tiny_config(**{"optimizer.learning_rate": 0.1, "optimizer.warmup_steps": 20, "optimizer.grad_clip": 1e-3})
    config.ema.update(decay=0.9999, warmup=True)
    schedule = schedule_of(config)
    scale = jnp.asarray(schedule.transitions.level.sigma, jnp.float32)

    def output(w, x_t, time):  # off by 3 w: the loss is 9 w^2, its gradient 18 w
        return x_t / scale[time.astype(int)][:, None, None, None] + 3 * w

    _, state, run = recorded(config, output)
    for _ in range(5):
        before = state
        state, metrics = run(before, {"x": np.zeros((8, 8, 8, 1), np.float32)})
    w = float(before.params["w"])
    np.testing.assert_allclose(metrics["loss"], 9 * w**2, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], 18 * w, rtol=1e-4)  # before clipping
    np.testing.assert_allclose(metrics["param_norm"], state.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1 * 4 / 20, rtol=1e-6)
    # A clipped gradient that is always the same: Adam moves by the learning rate, whatever the gradient's size.
    np.testing.assert_allclose(w - float(state.params["w"]), 0.1 * 4 / 20, rtol=1e-3)
    decay = (1 + 4) / (10 + 4)
    average = decay * float(before.ema_params["w"]) + (1 - decay) * float(state.params["w"])
    np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-5)
    assert int(state.step) == 5


@pytest.mark.parametrize("random_flip", [True, False])
def test_images_are_mirrored_if_the_config_wants_it(random_flip):
    config = tiny_config(**{"data.random_flip": random_flip, "diffusion.num_timesteps": 1})
    config.diffusion.update(schedule="linear", beta_start=1e-8, beta_end=1e-8)
    network, state, run = recorded(config, lambda w, x_t, time: w * x_t)
    x = to_model_range(image := a_batch(config, batch_size=64)["image"])
    run(state, {"image": image})
    shown = np.asarray(network.calls[-1].x_t)
    turned = abs(shown - x).max((1, 2, 3)) > 1e-2
    np.testing.assert_allclose(shown[turned], x[turned][:, :, ::-1], atol=1e-2)
    assert abs(turned.sum() - 32 * random_flip) <= 5 * 4 * random_flip


def test_the_first_step_that_is_not_finite_stays_marked():
    config = tiny_config()
    _, state, run = recorded(config, lambda w, x_t, time: w * x_t)
    good, bad = floats(), np.full((8, 8, 8, 1), np.nan, np.float32)
    for x, marked in ((good, -1), (good, -1), (bad, 3), (bad, 3), (good, 3)):
        state, _ = run(state, {"x": x})
        assert int(state.averages["nonfinite_step"]) == marked
    # The loss and its gradient are finite, and the new parameters are not.
    _, state, run = recorded(tiny_config(**{"optimizer.learning_rate": 3e38}), lambda w, x_t, time: w * x_t)
    state, metrics = run(state, {"x": good})
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert int(state.averages["nonfinite_step"]) == 1
    # The squared gradient overflows, and after clipping by an infinite norm the parameters are finite.
    _, state, run = recorded(config, lambda w, x_t, time: x_t + 1e12 * w)
    state, metrics = run(state, {"x": good})
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["param_norm"]) and int(state.averages["nonfinite_step"]) == 1
    # The loss alone overflows.
    _, state, run = recorded(config, lambda w, x_t, time: 1e20 + 1e-10 * w + 0 * x_t)
    state, metrics = run(state, {"x": good})
    assert not np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["param_norm"]) and int(state.averages["nonfinite_step"]) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "variance", "options"),
    [
        ("simple", "fixed_large", {"weighting": "min_snr"}),
        ("vlb", "learned_range", {"gray_levels": 17}),
        ("hybrid", "learned_range", {"gray_levels": 17, "weighting": "p2", "vlb_weight": 0.1}),
    ],
)
def test_a_loss_is_trained_with_the_options_of_the_config(name, variance, options):
    """Every option other than the default, against the core called by hand with the step's first key."""
    config = tiny_config(**{"diffusion.num_timesteps": 10, "diffusion.loss": name, "data.levels": 17})
    config.diffusion.update(prediction="v", variance=variance)
    config.diffusion.update({setting: value for setting, value in options.items() if setting != "gray_levels"})
    channels = 1 if name == "simple" else 2
    output = lambda w, x_t, time: w * jnp.concatenate([jnp.tanh(x_t + time[:, None, None, None] / 5)] * channels, -1)  # noqa: E731
    network, _, _ = recorded(config, output)
    objective, schedule, key = (
        make_objective(config, network, schedule_of(config)),
        schedule_of(config),
        jax.random.key(3),
    )
    x_0 = jnp.clip(floats(), -1, 1)
    found, _ = objective({"w": jnp.float32(0.7)}, None, key, Examples(x_0))
    by_hand, _ = getattr(losses, name)(
        jax.random.split(key, 3)[0],
        schedule,
        Denoiser(lambda x, time: output(0.7, x, time), "v", variance, clip=False),
        x_0,
        timestep_sampler=timesteps.stratified,
        **options,
    )
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_quarters_of_weighted_losses_are_weighted_means():
    """Importance sampling: the weights of a quarter's examples are divided out."""
    config = tiny_config(**{"diffusion.num_timesteps": 8, "diffusion.timestep_sampler": "loss_second_moment"})
    scale = jnp.asarray(schedule_of(config).transitions.level.sigma, jnp.float32)

    def output(w, x_t, time):
        return x_t / scale[time.astype(int)][:, None, None, None] + (1 + time)[:, None, None, None] * w

    network, state, run = recorded(config, output)
    kept = jnp.tile(jnp.arange(1.0, 9.0)[:, None], (1, 10))
    state = state.replace(loss_history=timesteps.LossHistory(kept, jnp.full(8, 10, jnp.int32)))
    p = 0.999 * np.arange(1, 9) / 36 + 0.001 / 8
    after, metrics = run(state, {"x": np.zeros((8, 8, 8, 1), np.float32)})
    t = np.asarray(network.calls[0].time).astype(int)
    weight, loss = 1 / (8 * p[t]), (1.0 + t) ** 2
    np.testing.assert_allclose(metrics["loss"], (weight * loss).mean(), rtol=1e-4)
    for quarter, name in enumerate(QUARTERS):
        here = t // 2 == quarter
        mean = (weight * loss)[here].sum() / weight[here].sum() if here.any() else np.nan
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-4)
    drawn = np.bincount(t, minlength=8)
    np.testing.assert_array_equal(after.loss_history.counts, 10 + drawn)
    # The kept losses of a step were all t + 1; the losses recorded there are those without the weights.
    expected = np.array(kept)
    for step, number in enumerate(drawn):
        expected[step, :number] = (1.0 + step) ** 2
    np.testing.assert_allclose(after.loss_history.losses, expected, rtol=1e-4)


@pytest.mark.thorough
def test_a_state_and_its_metrics_are_float32_with_x64(x64):
    """Every float of the state and the metrics; float64 data, too."""
    upsampler = {"data.low_resolution": 4, "diffusion.conditioning_noise": 0.5}
    hybrid = {"diffusion.loss": "hybrid", "diffusion.variance": "learned_range", "data.levels": None}
    for overrides in (hybrid, upsampler):
        built = training.build_program(tiny_config(**overrides))
        after = jax.eval_shape(built.train_step, built.abstract_state, {"x": np.zeros((8, 8, 8, 1))})
        floats = [leaf for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert {leaf.dtype.name for leaf in floats} == {"float32"}
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype, built.abstract_state, after[0])
        assert all(jax.tree.leaves(same))
