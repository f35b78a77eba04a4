"""The noise-aware classifier: network and loss against NumPy, and training from the command line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import losses, models, schedules, timesteps, training
from diffusion_jax.models import unet
from diffusion_jax.models.layers import LayerFactory
from diffusion_jax.runs import train, workdir
from helpers.configs import TINY_CLASSIFIER, a_batch, classifier_config
from helpers.networks import parameter_shapes, redraw
from helpers.work_directories import lines


@pytest.mark.thorough
def test_attention_pool_equals_numpy():
    """In float64: the mean precedes the positions, position embeddings are added, and each head has one softmax, for the
    mean's query."""
    layers = LayerFactory(num_groups=2, norm_epsilon=1e-5, initializer="openai", dtype=jnp.float32)
    pool = unet.AttentionPool(features=5, num_heads=1, head_channels=2, layers=layers)
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 6))
    params = jax.tree.map(lambda leaf: 3 * leaf, redraw(parameter_shapes(pool, x)))
    out = pool.apply({"params": params}, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for image, got in zip(np.asarray(x, np.float64), out, strict=True):
        positions = image.reshape(8, 6)
        tokens = np.vstack([positions.mean(0), positions]) + p["position"]
        q, k, v = (tokens @ p[name]["kernel"] + p[name]["bias"] for name in "qkv")
        found = []
        for head in range(3):
            own = slice(2 * head, 2 * head + 2)
            logits = q[0, own] @ k[:, own].T / np.sqrt(2)
            weights = np.exp(logits - logits.max())
            found.append(weights / weights.sum() @ v[:, own])
        np.testing.assert_allclose(
            got, np.concatenate(found) @ p["proj"]["kernel"] + p["proj"]["bias"], rtol=1e-4, atol=1e-4
        )


@functools.cache
def a_network():
    model = models.Classifier(**TINY_CLASSIFIER, dropout=0.5)
    shape = (2, 4, 8, 1)
    params = redraw(parameter_shapes(model, jnp.zeros(shape), jnp.zeros(2)))
    return model, params, jax.random.normal(jax.random.key(1), shape)


@pytest.mark.thorough
def test_logits_depend_on_the_image_the_time_and_every_parameter():
    model, params, x = a_network()

    def run(params, x, time):
        return model.apply({"params": params}, x, time)

    time = jnp.array([3.0, 700.0])
    logits = jax.jit(run)(params, x, time)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    assert abs(logits - jax.jit(run)(params, x, time[::-1])).max() > 1e-3
    grads, of_image = jax.jit(jax.grad(lambda *args: (run(*args, time) ** 2).sum(), argnums=(0, 1)))(params, x)
    assert (abs(of_image) > 0).all()  # what guidance uses
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if "['k']['bias']" not in jax.tree_util.keystr(path):  # a constant added to every logit moves no softmax
            assert abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)


@pytest.mark.thorough
def test_classifier_refuses_other_image_sizes():
    model, params, _ = a_network()
    with pytest.raises(ValueError, match=r"has 8 positions after downsampling, and these images have 4x4"):
        model.apply({"params": params}, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="Classifier of 2 levels needs sizes divisible by 2, because its pooling"):
        model.init(jax.random.key(0), jnp.zeros((1, 5, 4, 1)), jnp.zeros(1))
    for fields, words in (({"num_classes": 1}, "at least 2 classes"), ({"head_channels": 5}, "head_channels=5")):
        with pytest.raises(ValueError, match=words):
            wrong = models.Classifier(**TINY_CLASSIFIER | fields)
            wrong.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))


SCHEDULE = schedules.from_betas(schedules.betas("linear", 10, beta_end=0.5))


@pytest.mark.thorough
def test_classify_is_the_cross_entropy_at_x_t(x64):
    """In NumPy, for logits that are linear in x_t and time."""
    x_0, y = jax.random.normal(jax.random.key(0), (6, 2, 2, 1)), jnp.array([0, 2, 1, 1, 0, 2])
    w = jax.random.normal(jax.random.key(1), (4, 3))

    def logits_fn(x_t, time):
        return x_t.reshape(-1, 4) @ w + time[:, None] * jnp.arange(3)

    loss, parts = losses.classify(jax.random.key(2), SCHEDULE, logits_fn, x_0, y)
    t, x_t = np.asarray(parts.t), np.asarray(parts.x_t)
    assert len(set(t.tolist())) > 2 and t.min() >= 0 and t.max() < 10
    alpha_bar = SCHEDULE.alpha_bar[t][:, None, None, None]
    eps = (x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)
    assert abs(np.mean(eps)) < 4 / 24**0.5 and abs(np.std(eps) - 1) < 4 / 48**0.5
    logits = x_t.reshape(-1, 4) @ np.asarray(w) + t[:, None] * np.arange(3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(p[np.arange(6), y]), rtol=1e-10)
    np.testing.assert_array_equal(parts.accuracy, p.argmax(1) == np.asarray(y))
    assert (parts.importance == 1).all()


@pytest.mark.thorough
@pytest.mark.usefixtures("unchecked_annotations")
def test_classify_weights_importance_samples_and_gives_nan_for_labels_out_of_range():
    x_0, y = jnp.zeros((4, 2)), jnp.array([0, 1, 3, -1])
    logits_fn = lambda x_t, time: x_t @ jnp.ones((2, 3))  # noqa: E731
    loss, _ = jax.jit(lambda y: losses.classify(jax.random.key(0), SCHEDULE, logits_fn, x_0, y))(y)
    np.testing.assert_allclose(loss[:2], np.log(3), rtol=1e-5)
    assert np.isnan(loss[2:]).all()  # never a neighbor's
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 2, got 3"):
        losses.classify(jax.random.key(0), SCHEDULE, logits_fn, x_0, y)
    with pytest.raises(ValueError, match="labels must be int"):
        losses.classify(jax.random.key(0), SCHEDULE, logits_fn, x_0, y.astype(float))
    y = jnp.array([0, 1, 2, 2])
    twice = lambda key, n, total: (timesteps.uniform(key, n, total)[0], 2 * jnp.ones(n))  # noqa: E731
    loss, _ = losses.classify(jax.random.key(0), SCHEDULE, logits_fn, x_0, y, timestep_sampler=twice)
    np.testing.assert_allclose(loss[:2], 2 * np.log(3), rtol=1e-5)
    with pytest.raises(ValueError, match=r"must return \[B, K\]"):
        losses.classify(jax.random.key(0), SCHEDULE, lambda x_t, time: x_t[None], x_0, y)


@pytest.mark.thorough
def test_classifier_learns_two_classes():
    """Bright images have class 1, dark images class 0, and the noise is small, so the accuracy is soon 1."""
    little_noise = {"diffusion.beta_end": 1e-3, "diffusion.schedule": "linear"}
    config = classifier_config(**little_noise, **{"optimizer.learning_rate": 3e-3})
    state, train_step = training.create(config)
    batch = a_batch(config)
    batch["label"][4:] = 1
    batch["image"] = (40 + 170 * batch["label"][:, None, None, None] + batch["image"] % 40).astype(np.uint8)
    seen = []
    for _ in range(30):
        state, metrics = train_step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[0]["loss"] > 1.5 and np.mean([row["loss"] for row in seen[-5:]]) < 0.5
    assert np.mean([row["accuracy"] for row in seen[-5:]]) > 0.9 and "mse" not in seen[0]
    assert train_step._cache_size() == 1


@pytest.mark.whole
def test_a_classifier_run_logs_its_accuracy_and_draws_no_pictures(tmp_path, capsys):
    config = classifier_config(**{"training.num_steps": 2, "training.sample_every": 1})
    train.run(config, tmp_path)
    assert "Sample with --mode=sample" not in capsys.readouterr().out
    assert {"accuracy", "loss", "loss_q1"} <= set(lines(tmp_path)[0])
    assert not (tmp_path / "samples").exists()
    again = workdir.load_config(tmp_path)
    assert training.model_from_config(again) == training.model_from_config(config)
