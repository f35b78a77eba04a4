"""The accelerator benchmark: what it counts against published figures, and its report with nothing to run on."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerator, accelerator_cases, compiled, diffusers_network, roofline
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
    # Others convolve the doubled image where ours takes 4 products for 9 (models.convolution.convolve_upsampled).
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


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_reduce (p: bf16[2,8]) -> f32[2] {
  %p = bf16[2,8]{1,0} parameter(0)
  %wide = f32[2,8]{1,0} convert(%p)
  %zero = f32[] constant(0)
  ROOT %out = f32[2]{0} reduce(%wide, %zero), dimensions={1}, to_apply=%add
}

%fused_scale (p: f32[2]) -> f32[2] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %out.1 = f32[2]{0} multiply(%p.1, %p.1)
}

%body (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %state = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%state), index=1
  %i = s32[] get-tuple-element(%state), index=0
  %loop_fusion = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused_scale, metadata={op_name="jit(step)/while/body/mul"}
  ROOT %next = (s32[], f32[2]{0}) tuple(%i, %loop_fusion)
}

%condition (state.1: (s32[], f32[2])) -> pred[] {
  %state.1 = (s32[], f32[2]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x: bf16[2,4,4,8], kernel: bf16[8,3,3,8]) -> f32[2] {
  %x.1 = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  %kernel = bf16[8,3,3,8]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %conv = (bf16[2,4,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %kernel), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(UNet)/conv1/conv_general_dilated"}
  %y = bf16[2,4,4,8]{3,2,1,0} get-tuple-element(%conv), index=0
  %small = bf16[2,8]{1,0} bitcast(%y)
  %mean = f32[2]{0} fusion(%small), kind=kInput, calls=%fused_reduce, metadata={op_name="jit(step)/transpose(jvp(UNet))/norm1/norm/reduce_sum"}
  %start = (s32[], f32[2]{0}) tuple(%mean, %mean)
  %loop = (s32[], f32[2]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[2]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_kernels_of_a_program_by_hand():
    convolution, reduction, product = compiled.kernels(PROGRAM)
    assert convolution == compiled.Kernel(
        "convolution",
        "forward",
        2 * 2 * 4 * 4 * 8 * 2,  # read and written in bfloat16; the kernel stands in the chip's own memory
        1,
        "jit(step)/jvp(UNet)/conv1/conv_general_dilated",
        "b01f_o01i->b01f",
    )
    assert (reduction.kind, reduction.phase, reduction.bytes) == ("reduction", "backward", 2 * 8 * 2 + 2 * 4)
    assert (product.kind, product.phase, product.bytes, product.runs) == ("element-wise", "rest", 16, 5)
    found = compiled.summary([convolution, reduction, product])
    assert found.kernels == 7 and found.count["element-wise"] == 5 and found.bytes["element-wise"] == 5 * 16
    assert (found.norms, found.norm_bytes) == (1, reduction.bytes)
    assert found.layouts == [("b01f_o01i->b01f", 1)]
    # 1 GB/s and 1 TFLOP/s: the convolution by its bytes, then the rest.
    least, expected = compiled.seconds(found, 1, 1, 1, 1.0)
    assert least == pytest.approx(1e-9 * (convolution.bytes + reduction.bytes + 5 * 16))
    assert expected == pytest.approx(least / compiled.REACHED_BANDWIDTH + 7)


def test_loops_whose_length_is_in_their_condition_and_asynchronous_copies():
    program = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace(
        "  ROOT %more = pred[] constant(true)",
        "  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0\n  %limit = s32[] constant(9)\n"
        "  ROOT %more = pred[] compare(%i.1, %limit), direction=LT",
    )
    assert [kernel.runs for kernel in compiled.kernels(program)] == [1, 1, 9]
    copy = "  %moved = (bf16[8,3,3,8]{3,2,1,0:S(1)}, bf16[2,4,4,8]{3,2,1,0}, u32[]) copy-start(%x.1)\n"
    moved = compiled.kernels(PROGRAM.replace("  %conv =", copy + "  %conv ="))[0]
    assert (moved.kind, moved.bytes) == ("other", 2 * 4 * 4 * 8 * 2)


def test_kernels_of_a_program_of_this_machine():
    def steps(x, kernel):
        def step(x, _):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)), None

        return jax.lax.scan(step, x, length=6)[0]

    text = jax.jit(steps).lower(jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))).compile().as_text()
    assert compiled.summary(compiled.kernels(text), steps=6).count["convolution"] == 1


def test_the_error_of_a_target_without_its_compiler_names_the_package(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for tpu")

    monkeypatch.setattr(compiled.topologies, "get_topology_desc", missing)
    with pytest.raises(RuntimeError, match="it needs libtpu"), compiled.target("v5e"):
        pass


def options(*arguments: str) -> argparse.Namespace:
    return accelerator.parse(list(arguments))


def pretended(kind: str, platform: str, rate):
    """A machine on which a case runs at rate(case, flags) images/s, or fails with what that returns."""

    def measure(case: Case, flags: str = "") -> dict:
        if case.work == "device":
            return {"platform": platform, "kind": kind, "versions": "jax 0"}
        if case.work in accelerator_cases.LAYERS:
            return {"call": 1e-3, "flops": 1e9, "bytes": 1e6, "deviation": 1e-3}
        found = rate(case, flags)
        if isinstance(found, str):
            return {"error": found}
        return {"rate": found, "first": 1.0, "peak": 2e9, "parameters": 10, "gmac": 6.22}

    return measure


def test_the_report_has_every_row_and_continues_after_a_failure():
    def rate(case, flags):
        if case.network == "adm256" and case.batch == 8:
            return "out of memory"
        return (2000.0 if case.library == "ours" else 1000.0) * (1.1 if "nhwc" in flags else 1)

    lines = list(accelerator.report(options("--precisions=tf32,bfloat16"), pretended("NVIDIA H100 PCIe", "gpu", rate)))
    rows = [line for line in lines if line.startswith("|") and not line.startswith("|-")]
    assert all(line.count("|") == rows[0].count("|") for line in rows[:97])
    measured = [line for line in rows if "| ours |" in line or "| torch |" in line]
    assert len(measured) == 3 * 2 * 2 * 4 * 2  # networks, works, precisions, batches, libraries
    assert sum("out of memory" in line for line in measured) == 2 * 2 * 2
    assert sum("| 2.00 |" in line and "| torch |" in line for line in measured) == len(measured) // 2 - 4
    # 2,000 images/s of 6.22 GMAC, forward and backward, of 756 TFLOP/s.
    assert any("| train | bfloat16 | 64 | ours | 2,000 | 9.9% |" in line for line in measured)
    tried = [line for line in rows if any(f"| {option.name} |" in line for option in accelerator.OPTIONS)]
    assert len(tried) == 2 * sum(len(option.works) for option in accelerator.OPTIONS)
    faster = [line for line in tried if "faster: make it the default" in line]
    assert len(faster) == 4 and all("NHWC" in line and "| 1.100 |" in line for line in faster)
    assert sum(line.split("|")[1].strip() in accelerator_cases.LAYERS for line in rows) == 2 * len(
        accelerator_cases.LAYERS
    )


def test_a_tpu_skips_pytorch_and_the_options_of_gpus():
    lines = list(accelerator.report(options("--networks=cifar10"), pretended("TPU v5 lite", "tpu", lambda *_: 100.0)))
    assert not any("| torch |" in line for line in lines)
    assert any("PyTorch is skipped" in line for line in lines)
    assert sum("skipped: an option of GPUs" in line for line in lines) == 2 * 7


def test_an_unknown_chip_has_no_mfu_unless_its_peak_is_given():
    chosen, tables = pretended("NVIDIA Nameless", "gpu", lambda *_: 100.0), "--tables=side_by_side"
    lines = list(accelerator.report(options(tables), chosen))
    assert any("there is no MFU" in line for line in lines) and not any("%" in line for line in lines)
    assert any("| 0.4% |" in line for line in accelerator.report(options(tables, "--peak_tflops=1000"), chosen))


def test_an_option_is_faster_only_if_it_is_in_every_round():
    option = accelerator.OPTIONS[0]
    assert accelerator.verdict(option, [1.04, 1.05, 1.06]).startswith("faster")
    assert accelerator.verdict(option, [0.98, 1.05, 1.30]) == "no difference"
    assert accelerator.verdict(option, [0.94, 0.95, 0.99]) == "slower"


SMALL = {"small": True, "seconds": 0.01, "steps": 2}


@pytest.mark.whole
def test_small_runs_on_a_cpu():
    for case in (Case("cifar10", "train", "float32", 2, **SMALL), Case("adm64", "sample", "float32", 2, **SMALL)):
        found = accelerator_cases.measure(case)
        assert "error" not in found, found
        assert found["rate"] > 0 and found["first"] > 0 and found["peak"] > 0 and found["parameters"] > 100_000
    found = accelerator_cases.measure(Case("cifar10", "convolution 3 -> 128", "bfloat16", 2, **SMALL))
    assert 1e-4 < found["deviation"] < 1e-2  # of a sum of 27 products rounded to 8 bits
    # 4 x 4 x 128 outputs of 27 products each, and the same for either gradient.
    assert found["flops"] == 3 * 2 * 2 * 4 * 4 * 128 * 27


def test_the_program_of_this_machine_is_summarized():
    case = Case("cifar10", "sample", "float32", 2, library="hlo", changes={"target": "here"}, **SMALL | {"steps": 1})
    found = accelerator_cases.measure(case)
    assert found["kind"] == "cpu"
    read = compiled.Summary(**found["summary"])
    assert read.kernels > 20 and sum(read.phases.values()) == read.kernels


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
    chosen.tables = ("side_by_side",)

    def measure(case, flags=""):  # ours is measured elsewhere
        return (
            accelerator_cases.measure(case)
            if case.library == "torch" or case.work == "device"
            else {"error": "left out"}
        )

    lines = list(accelerator.report(chosen, measure))
    measured = [line for line in lines if "| torch (eager) |" in line]
    assert len(measured) == 3 * 2
