"""DDIM inversion and its second order: round trips and the end of the probability flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import sampling, schedules
from helpers.gaussian_mixtures import FULL, S2, M, gaussian, mixture

KEY = jax.random.key(0)
FREE = {"clip": False}


def round_trip(order, steps, denoise_fn=None):
    denoise_fn = denoise_fn or mixture()
    schedule, x_0 = schedules.respace(FULL, steps, "log_snr"), np.linspace(-1.1, 1.1, 23)[:, None]
    x_T = sampling.encode(schedule, denoise_fn, x_0, order=order)
    back = sampling.heun(**FREE) if order == 2 else sampling.ddim(**FREE)
    return float(np.sqrt(np.mean((sampling.sample(KEY, schedule, denoise_fn, x_T, back) - x_0) ** 2)))


@pytest.mark.whole
def test_inversion_reconstructs_and_the_second_order_does_so_better(x64):
    first, second = [round_trip(1, n) for n in (50, 100)], [round_trip(2, n) for n in (50, 100)]
    assert first[0] > 1.7 * first[1] and second[0] > 3 * second[1]
    assert second[0] < 0.3 * first[0]
    assert round_trip(2, 50) < 0.5 * round_trip(1, 100)  # at the same number of network calls


def test_inversion_ends_where_the_probability_flow_does(x64):
    a = FULL.alpha_bar[-1]
    x_0 = np.array([[-0.7], [0.2], [1.0]])
    truth = np.sqrt(a) * M + np.sqrt((a * S2 + 1 - a) / S2) * (x_0 - M)
    for order, tolerance in ((1, 0.1), (2, 4e-3)):
        schedule = schedules.respace(FULL, 100, "log_snr")
        np.testing.assert_allclose(sampling.encode(schedule, gaussian(), x_0, order=order), truth, atol=tolerance)


def test_every_prediction_inverts_to_the_same_noise(x64):
    schedule, x_0 = schedules.respace(FULL, 40, "log_snr"), np.array([[-0.7], [0.2], [1.0]])
    outs = [
        sampling.encode(schedule, gaussian(prediction), x_0, order=2, prediction=prediction)
        for prediction in ("eps", "x_0", "v", "score")
    ]
    np.testing.assert_allclose(outs[1:], [outs[0]] * 3, rtol=1e-6)
    part = sampling.encode(schedule, gaussian(), x_0, start=20)
    whole = sampling.encode(schedule, gaussian(), part * 0 + x_0)
    assert abs(part).max() < abs(whole).max()
    again = sampling.sample(KEY, schedule, gaussian(), part, sampling.ddim(**FREE), start=20)
    np.testing.assert_allclose(again, x_0, atol=0.1)


def test_encode_refuses_wrong_arguments(x64):
    schedule, x_0 = schedules.respace(FULL, 10), jnp.ones((1, 1))
    for words, options in {
        "order must be 1 or 2": {"order": 3},
        "x_prev": {"prediction": "x_prev"},
        "clip is for order 1": {"order": 2, "clip": True},
        "start=10": {"start": 10},
    }.items():
        with pytest.raises(ValueError, match=words):
            sampling.encode(schedule, gaussian(), x_0, **options)
