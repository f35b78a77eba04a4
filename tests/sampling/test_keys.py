"""One key for a batch, or a key for each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, editing, sampling, schedules
from helpers.gaussian_mixtures import FULL, mixture

SHORT = schedules.respace(FULL, 8)
X = jax.random.normal(jax.random.key(1), (5, 3))
SAMPLERS = {
    "ddpm": sampling.ddpm(),
    "ddim": sampling.ddim(1.0),
    "sde": sampling.dpm_solver_pp(2, sde=True),
    "heun": sampling.heun(churn=4.0),
    "replacement": editing.replacement(sampling.ddpm(), X, jnp.zeros((5, 3), bool).at[:, 0].set(True)),
}


def draw(key, x_T, sampler):
    return jax.jit(lambda key, x_T: sampling.sample(key, SHORT, Denoiser(mixture(), clip=False), x_T, sampler))(
        key, x_T
    )


@pytest.mark.parametrize(
    "name", ["ddpm", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("ddim", "sde", "heun"))]
)
def test_a_row_depends_on_its_own_key_only(name):
    keys = jax.random.split(jax.random.key(3), 5)
    together = draw(keys, X, SAMPLERS[name])
    order = np.array([4, 0, 2])
    np.testing.assert_allclose(draw(keys[order], X[order], SAMPLERS[name]), together[order], rtol=1e-5, atol=1e-6)
    # Rows with equal keys have equal noise; rows with different keys do not.
    same = draw(keys[np.zeros(5, int)], jnp.broadcast_to(X[:1], X.shape), SAMPLERS[name])
    np.testing.assert_allclose(same, jnp.broadcast_to(same[:1], same.shape), rtol=1e-5, atol=1e-6)
    other = draw(keys, jnp.broadcast_to(X[:1], X.shape), SAMPLERS[name])
    assert len(np.unique(np.round(other[:, 0], 4))) == 5


def test_keys_of_a_wrapped_sampler():
    keys = jax.random.split(jax.random.key(3), 5)
    together = draw(keys, X, SAMPLERS["replacement"])
    np.testing.assert_array_equal(together[:, 0], X[:, 0])
    changed = draw(keys.at[1].set(jax.random.key(9)), X, SAMPLERS["replacement"])
    differs = np.abs(changed - together).max(axis=1) > 1e-3
    assert differs.tolist() == [False, True, False, False, False]


def test_the_number_of_keys_is_the_number_of_rows(unchecked_annotations):
    with pytest.raises(ValueError, match="3 keys for 5 rows"):
        draw(jax.random.split(jax.random.key(0), 3), X, SAMPLERS["ddpm"])
    with pytest.raises(ValueError, match="one key, or one for each row"):
        draw(jax.random.split(jax.random.key(0), (5, 2)), X, SAMPLERS["ddpm"])
