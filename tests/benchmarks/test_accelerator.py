"""The accelerator benchmark: what it counts against published figures, and its report with nothing to run on."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerator, accelerator_cases, diffusers_network, roofline
from benchmarks.accelerator_cases import Case
from diffusion_jax import data, models, training


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


def test_multiplications_of_loops_branches_and_groups():
    a, b = jnp.zeros((2, 3)), jnp.zeros((3, 3))

    def seven(x):
        return jax.lax.scan(lambda x, _: (x @ b, None), x, length=7)[0]

    assert roofline.macs(jax.jit(seven), a) == 7 * 2 * 3 * 3
    assert roofline.macs(lambda x: jax.lax.cond(x[0, 0] > 0, seven, lambda x: x @ b, x), a) == 7 * 2 * 3 * 3
    assert roofline.macs(jax.checkpoint(seven), a) == 7 * 2 * 3 * 3

    def grouped(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=4)

    # Each of 4 x 4 x 8 outputs is a sum over 3 x 3 pixels of 8 / 4 channels.
    assert roofline.macs(grouped, jnp.zeros((1, 8, 8, 8)), jnp.zeros((3, 3, 2, 8))) == 4 * 4 * 8 * 9 * 2
    with pytest.raises(NotImplementedError, match="while_loop"):
        roofline.macs(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ b, x), b)


def test_utilization_is_one_at_the_rates_of_the_peaks():
    for kind, gmac, images in (("NVIDIA H100 80GB HBM3", 6.22, 26_500), ("NVIDIA A100-SXM4-80GB", 1119.8, 46.4)):
        peak = roofline.card(kind).bfloat16
        assert roofline.utilization(gmac * 1e9, images, True, peak) == pytest.approx(1, rel=0.01)
    assert roofline.utilization(6.22e9, 3 * 26_500, False, 989.4) == pytest.approx(1, rel=0.01)


def test_cards_are_found_by_the_names_of_devices():
    named = {
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-40GB": "A100 40 GB",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "Tesla V100-SXM2-16GB": "V100 SXM2",
        "TPU v5 lite": "TPU v5e",
        "TPU v5p": "TPU v5p",
        "TPU v6 lite": "TPU v6e",
    }
    assert {kind: roofline.card(kind).name for kind in named} == named
    assert roofline.card("cpu") is None


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


def test_a_tpu_skips_pytorch():
    lines = list(accelerator.report(options("--networks=cifar10"), pretended("TPU v5 lite", "tpu", lambda _: 100.0)))
    assert not any("| torch |" in line for line in lines)
    assert any("PyTorch is skipped" in line for line in lines)


def test_an_unknown_chip_has_no_mfu_unless_its_peak_is_given():
    chosen = pretended("NVIDIA Nameless", "gpu", lambda _: 100.0)
    lines = list(accelerator.report(options(), chosen))
    assert any("there is no MFU" in line for line in lines) and not any("%" in line for line in lines)
    assert any("| 0.4% |" in line for line in accelerator.report(options("--peak_tflops=1000"), chosen))


SMALL = {"small": True, "seconds": 0.01, "steps": 2}


@pytest.mark.whole
def test_small_runs_on_a_cpu():
    for case in (Case("cifar10", "train", "float32", 2, **SMALL), Case("adm64", "sample", "float32", 2, **SMALL)):
        found = accelerator_cases.measure(case)
        assert "error" not in found, found
        assert found["rate"] > 0 and found["first"] > 0 and found["peak"] > 0 and found["parameters"] > 100_000


def test_a_case_is_measured_in_a_separate_process():
    assert accelerator.launch(Case("cifar10", "device", "tf32", 1))["platform"] == jax.default_backend()
    assert accelerator.launch(Case("nameless", "train", "tf32", 1))["error"] == "KeyError: 'nameless'"


@pytest.mark.parity
def test_diffusers_networks_are_of_the_same_size_and_cost():
    """Theirs convolve doubled images as they are, 9 products for each output of a channel; ours need 4 of them."""
    pytest.importorskip("diffusers")
    for network in accelerator_cases.NETWORKS:
        config = accelerator_cases.config_of(Case(network, "train", "float32", 1))
        parameters, multiplied = diffusers_network.count_parameters_and_macs(diffusers_network.unet_fields(config))
        built = training.build_program(config)
        assert parameters == sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state.params))
        ours = roofline.forward_macs(built.model, data.example_shape(config.data))
        # Each level but the first ends with a convolution of its own width, of images doubled to the size of the next.
        widths = [round(config.model.channels * multiplier) for multiplier in config.model.channel_multipliers]
        sizes = [config.data.image_size >> level for level in range(len(widths))]
        saved = sum((9 - 4) * size**2 * width**2 for size, width in zip(sizes, widths[1:], strict=False))
        assert saved > 0.02 * ours
        assert multiplied - saved == ours


@pytest.mark.parity
def test_small_runs_beside_diffusers():
    pytest.importorskip("diffusers")
    chosen = options(
        "--small", "--batch_sizes=2", "--precisions=bfloat16", "--steps=2", "--seconds=0.01", "--torch_mode=eager"
    )

    def measure(case):  # ours is measured elsewhere
        return (
            accelerator_cases.measure(case)
            if case.library == "torch" or case.work == "device"
            else {"error": "left out"}
        )

    lines = list(accelerator.report(chosen, measure))
    measured = [line for line in lines if "| torch (eager) |" in line]
    assert len(measured) == 3 * 2
