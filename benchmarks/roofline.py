"""Published peak performance of chips, multiplication counts of a jaxpr, and the model FLOP utilization."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.extend import core


class Card(NamedTuple):
    """Published figures of a chip: dense TFLOP/s for each operand precision (None: not supported), and GB/s.

    tf32: JAX's default precision for float32 products: TF32 since Ampere, bfloat16 operands on TPUs.
    """

    name: str
    float32: float | None
    tf32: float | None
    bfloat16: float | None
    bandwidth: float


# The keys are substrings of JAX's `device_kind` or of `torch.cuda.get_device_name()`; the first match counts.
CARDS = {
    "H100 PCIe": Card("H100 PCIe", 51, 378, 756, 2039),
    "H100 NVL": Card("H100 NVL", 60, 418, 835, 3900),
    "H100": Card("H100 SXM", 67, 494.7, 989.4, 3352),
    "H200 NVL": Card("H200 NVL", 60, 418, 836, 4800),
    "H200": Card("H200", 67, 494.7, 989.4, 4800),
    "A100-SXM4-40GB": Card("A100 40 GB", 19.5, 156, 312, 1555),
    "A100-PCIE-40GB": Card("A100 40 GB", 19.5, 156, 312, 1555),
    "A100": Card("A100 80 GB", 19.5, 156, 312, 2039),
    "RTX 4090": Card("RTX 4090", 82.6, 82.6, 165.2, 1008),  # with float32 accumulation
    "NVIDIA L40": Card("L40", 90.5, 90.5, 181, 864),
    "NVIDIA L4": Card("L4", 30.3, 60, 121, 300),
    "V100": Card("V100 SXM2", 15.7, 15.7, None, 900),
    "TPU v4": Card("TPU v4", None, 275, 275, 1228),
    "TPU v5 lite": Card("TPU v5e", None, 197, 197, 819),
    "TPU v5e": Card("TPU v5e", None, 197, 197, 819),
    "TPU v5": Card("TPU v5p", None, 459, 459, 2765),
    "TPU v6": Card("TPU v6e", None, 918, 918, 1640),
}


def card(kind: str) -> Card | None:
    """Returns the card whose key is a substring of `kind`; None if no key matches."""
    return next((card for key, card in CARDS.items() if key in kind), None)


def macs(function, *arguments) -> int:
    """Counts the multiplications in convolutions and matrix products, from the jaxpr of `function`.

    arguments: arrays or ShapeDtypeStructs. Multiplications with padding count, and a loop's body counts once per iteration.
    Raises: NotImplementedError for a `while_loop`, because the jaxpr does not contain the loop's length.
    """
    return _macs(jax.make_jaxpr(function)(*arguments).jaxpr)


def _macs(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "while":
            raise NotImplementedError(
                "the number of iterations in a while_loop is unknown; count the loop's body instead"
            )
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            output_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // output_features
        inner = [_macs(inner_jaxpr) for inner_jaxpr in _inner(eqn)]
        total += max(inner) if name == "cond" else eqn.params.get("length", 1) * sum(inner)
    return total


def _inner(eqn) -> list[core.Jaxpr]:
    """Returns the jaxprs in an equation's parameters; for a custom derivative, only the function's jaxpr."""
    jaxprs = []
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if isinstance(part, core.Jaxpr):
                jaxprs.append(part)
    return jaxprs


def forward_macs(model, image_shape: tuple[int, int, int]) -> int:
    """Counts the multiplications of a network call for one image [H, W, C]."""
    labels = (jax.ShapeDtypeStruct((1,), "int32"),) if model.num_classes else ()
    x, time = jax.ShapeDtypeStruct((1, *image_shape), "float32"), jax.ShapeDtypeStruct((1,), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), x, time, *labels)
    return macs(model.apply, variables, x, time, *labels)


def utilization(macs_per_image: float, images_per_s: float, train: bool, tflops: float) -> float:
    """Returns the model FLOP utilization: 2 FLOP per multiplication, three times as many in a train step, over the peak.

    Gradients with respect to inputs and to kernels each cost as much as the call. Recomputation and element-wise operations
    do not count.
    """
    return (3 if train else 1) * 2 * macs_per_image * images_per_s / (tflops * 1e12)
