"""The accelerator benchmark: what it counts against published figures, and its report with nothing to run on."""

import argparse

import jax
import pytest

from benchmarks import accelerator, accelerator_cases, roofline
from benchmarks.accelerator_cases import Case
from diffusion_jax import models


@pytest.fixture(autouse=True)
def restored_precision():
    """The benchmark sets jax's precision for the whole process."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "pixels", "gmac"),
    [
        ("ddpm_cifar10", 32, 6.22),
        ("improved_cifar10", 32, 8.39),
        ("ddpm_256", 256, 248.5),
        ("adm_imagenet64", 64, 109.7),
        ("adm_imagenet256", 256, 1119.8),
    ],
)
def test_multiplications_are_the_published_ones(name, pixels, gmac):
    model = models.preset(name)
    # Others convolve the doubled image where ours takes 4 products for 9 (models.layers.convolve_upsampled).
    levels = range(1, len(model.channel_multipliers))
    saved = sum(5 * (model.width(level) * (pixels >> (level - 1))) ** 2 for level in levels)
    counted = (roofline.forward_macs(model, (pixels, pixels, 3)) + saved) / 1e9
    assert abs(counted - gmac) < 0.5 * 10 ** -(len(str(gmac)) - str(gmac).index(".") - 1)  # to the last digit given


def options(*arguments: str) -> argparse.Namespace:
    return accelerator.parse(list(arguments))


def pretended(kind: str, platform: str, rate):
    """A machine on which a case runs at rate(case) images/s, or fails with what that returns."""

    def measure(case: Case) -> dict:
        if case.work == "device":
            return {"platform": platform, "kind": kind, "versions": "jax 0"}
        found = rate(case)
        if isinstance(found, str):
            return {"error": found}
        return {"rate": found, "first": 1.0, "peak": 2e9, "parameters": 10, "gmac": 6.22}

    return measure


def test_the_report_has_every_row_and_continues_after_a_failure():
    def rate(case):
        if case.network == "adm256" and case.batch == 8:
            return "out of memory"
        return 2000.0 if case.library == "ours" else 1000.0

    lines = list(accelerator.report(options("--precisions=tf32,bfloat16"), pretended("NVIDIA H100 PCIe", "gpu", rate)))
    rows = [line for line in lines if line.startswith("|") and not line.startswith("|-")]
    assert all(line.count("|") == rows[0].count("|") for line in rows)
    measured = [line for line in rows if "| ours |" in line or "| torch |" in line]
    assert len(measured) == 3 * 2 * 2 * 4 * 2  # networks, works, precisions, batches, libraries
    assert sum("out of memory" in line for line in measured) == 2 * 2 * 2
    assert sum("| 2.00 |" in line and "| torch |" in line for line in measured) == len(measured) // 2 - 4
    # 2,000 images/s of 6.22 GMAC, forward and backward, of 756 TFLOP/s.
    assert any("| train | bfloat16 | 64 | ours | 2,000 | 9.9% |" in line for line in measured)


SMALL = {"small": True, "seconds": 0.01, "steps": 2}


@pytest.mark.whole
def test_small_runs_on_a_cpu():
    for case in (Case("cifar10", "train", "float32", 2, **SMALL), Case("adm64", "sample", "float32", 2, **SMALL)):
        found = accelerator_cases.measure(case)
        assert "error" not in found, found
        assert found["rate"] > 0 and found["first"] > 0 and found["peak"] > 0 and found["parameters"] > 100_000
