"""The accelerator benchmark: the counted multiplications against published numbers, and small runs."""

import jax
import pytest

from benchmarks import accelerator_cases, roofline
from benchmarks.accelerator_cases import Case
from diffusion_jax import models


@pytest.fixture(autouse=True)
def restored_precision():
    """The benchmark sets jax's precision for the whole process."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "pixels", "gmac"), [("ddpm_cifar10", 32, 6.22), ("adm_imagenet64", 64, 109.7)])
def test_multiplications_are_the_published_ones(name, pixels, gmac):
    model = models.preset(name)
    # Published counts convolve the doubled image; this package takes 4 products for 9 (models.layers.convolve_upsampled).
    levels = range(1, len(model.channel_multipliers))
    saved = sum(5 * (model.width(level) * (pixels >> (level - 1))) ** 2 for level in levels)
    counted = (roofline.forward_macs(model, (pixels, pixels, 3)) + saved) / 1e9
    assert abs(counted - gmac) < 0.5 * 10 ** -(len(str(gmac)) - str(gmac).index(".") - 1)  # to the last digit given


@pytest.mark.slow
def test_small_runs_on_a_cpu():
    for case in (("cifar10", "train"), ("adm64", "sample")):
        found = accelerator_cases.measure(Case(*case, "float32", 2, small=True, seconds=0.01, steps=2))
        assert "error" not in found and found["rate"] > 0 and found["parameters"] > 100_000, found
