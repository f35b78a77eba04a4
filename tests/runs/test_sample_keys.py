"""--mode=sample draws each sample with its own key, for any batch size and device count."""

import dataclasses

import numpy as np
import pytest

from diffusion_jax import pretrained, sampling
from diffusion_jax.runs import sample
from diffusion_jax.runs.sampling_setup import SamplingSetup, resolve_sampling
from helpers.configs import conditional
from helpers.program import changed_program, finish, flags_of, start
from helpers.work_directories import untrained

# Replaces the conversion to gray levels.
STORES_FLOATS = """
import numpy as np
from diffusion_jax.runs.sampling_setup import SamplingSetup

def to_floats(setup, samples):
    assert setup.net.num_devices == 4
    return np.asarray(samples)

SamplingSetup.to_examples = to_floats
"""


@dataclasses.dataclass(frozen=True)
class sum_of_draws(sampling.Sampler):
    """Adds the noise of every step to x_T."""

    def step(self, key, denoiser, x_t, transition, state):
        return sampling.Step(x_t + sampling.normal(key, x_t), x_t)


@pytest.mark.whole
def test_draws_are_equal_to_the_bit_for_any_batch_size():
    """For seven samples: the sum of x_T and the noise in five steps, and the classes."""
    config = conditional(**{"data.levels": None})  # the setup returns floats
    setup = resolve_sampling(config, pretrained.from_config(config))
    setup = dataclasses.replace(setup, sampler=sum_of_draws())

    def draw(size):
        batches = range(-(-7 // size))
        draws = [setup.generate_batch(3, i, size) for i in batches]
        classes = [setup.rows(i * size + np.arange(size))["y"] for i in batches]
        return np.concatenate(draws)[:7], np.concatenate(classes)[:7]

    draws, classes = draw(7)
    assert classes.tolist() == list(range(7))
    assert len(np.unique(draws, axis=0)) == 7 and abs(draws.var() / 6 - 1) < 0.3
    for size in (1, 2, 3):
        others, classes_of_others = draw(size)
        np.testing.assert_array_equal(others, draws)
        np.testing.assert_array_equal(classes_of_others, classes)


@pytest.mark.whole
def test_images_for_any_batch_size_and_on_four_devices(tmp_path, monkeypatch):
    """With equal batch sizes, bit-identical for any number of samples; otherwise equal up to the rounding in DDIM's 50
    steps."""
    settings = {"diffusion.num_timesteps": 1000, "sampling.sampler": "ddim", "sampling.steps": 50}
    run = untrained(tmp_path / "run", conditional(**settings))

    def overrides(batch_size, num_samples):
        return settings | {"sampling.batch_size": batch_size, "sampling.num_samples": num_samples}

    with monkeypatch.context() as patched:
        patched.setattr(SamplingSetup, "to_examples", lambda setup, samples: np.asarray(samples))
        images = {
            sizes: np.load(sample.run(conditional(**overrides(*sizes)), run).path)["arr_0"]
            for sizes in ((4, 8), (4, 5), (1, 8), (3, 8), (8, 8))
        }
    expected = images[4, 8]
    assert expected.dtype == np.float32 and abs(expected).max() <= 1 < 10 * expected.std()
    np.testing.assert_array_equal(images[4, 5], expected[:5])

    # Batches of 6 samples become batches of 8, two on each device.
    path = run / "samples" / "step1_ema_ddim50_seed0_n8.npz"
    path.unlink()
    flags = flags_of(conditional(**overrides(6, 8)), run)
    program = changed_program(tmp_path, STORES_FLOATS)
    code, out, err = finish(start(*flags, "--mode=sample", program=program, JAX_NUM_CPU_DEVICES="4"))
    assert code == 0, out + err
    images["devices"] = np.load(path)["arr_0"]
    for sizes in ((1, 8), (3, 8), (8, 8), "devices"):
        np.testing.assert_allclose(images[sizes], expected, atol=1e-3, err_msg=str(sizes))
