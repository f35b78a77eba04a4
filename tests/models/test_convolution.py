"""Convolutions as matrix products, and convolutions of doubled images: equal to XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.models import convolution
from diffusion_jax.models.blocks import upsample_2x
from diffusion_jax.models.layers import LayerFactory
from helpers.networks import TINY, init, redraw


@pytest.mark.whole
@pytest.mark.parametrize(
    ("size", "padding"),
    [((3, 3), ((1, 1), (1, 1))), ((3, 3), ((0, 2), (1, 0))), ((2, 2), ((1, 0), (0, 1))), ((3, 1), ((0, 1), (0, 0)))],
)
def test_convolve_matmul_equals_xla(size, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 6, 4, 5)), jax.random.normal(keys[1], (*size, 5, 3))
    y = convolution.convolve_xla(x, kernel, padding)
    g = jax.random.normal(keys[2], y.shape).astype(jnp.bfloat16).astype(jnp.float32)

    def both(convolve, *inputs):
        y, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, padding), *inputs)
        return y, *pullback(g)

    for mine, true in zip(
        both(convolution.convolve_matmul, x, kernel), both(convolution.convolve_xla, x, kernel), strict=True
    ):
        np.testing.assert_allclose(mine, true, rtol=1e-5, atol=1e-5)
    # In bfloat16 operands are rounded and sums are not: the same as of rounded numbers, gradients rounded once more.
    low = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    computed = both(convolution.convolve_matmul, *low)
    assert [a.dtype for a in computed] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    true = both(convolution.convolve_xla, *(a.astype(jnp.float32) for a in low))
    for mine, exact, rtol in zip(computed, true, (1e-5, 2**-8, 2**-8), strict=True):
        np.testing.assert_allclose(mine.astype(np.float32), exact, rtol=rtol, atol=1e-5)


def test_convolve_upsampled_sums_the_kernel_before_rounding():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 8, 8, 64)), jax.random.normal(keys[1], (3, 3, 64, 64))
    low, true = x.astype(jnp.bfloat16), convolution.convolve_xla(upsample_2x(x), kernel)

    def error(y):
        return np.linalg.norm(y.astype(np.float32) - true) / np.linalg.norm(true)

    plain, first = convolution.convolve_matmul(upsample_2x(low), kernel), kernel.astype(jnp.bfloat16)
    for products, convolve in ((True, convolution.convolve_matmul), (False, convolution.convolve_xla)):
        layers = LayerFactory(4, 1e-6, "ho", jnp.dtype("bfloat16"), products)
        params = {"params": {"kernel": kernel, "bias": jnp.zeros(64)}}
        y = layers.conv(64, "up", upsample=True).apply(params, low)
        # As of the doubled image itself; with kernels that are rounded before they are added up 1.25 times that.
        assert error(y) < 1.05 * error(plain.astype(jnp.bfloat16))
        assert error(convolution.convolve_upsampled(convolve, low, first).astype(jnp.bfloat16)) > 1.2 * error(y)


@pytest.mark.whole
@pytest.mark.parametrize("convolve", [convolution.convolve_xla, convolution.convolve_matmul])
@pytest.mark.parametrize("size", [(4, 6), (1, 1)])
def test_convolve_upsampled_equals_the_convolution_of_the_upsampled_image(convolve, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, *size, 5)), jax.random.normal(keys[1], (3, 3, 5, 3))
    g = jax.random.normal(keys[2], (2, 2 * size[0], 2 * size[1], 3))
    y, pullback = jax.vjp(lambda x, kernel: convolution.convolve_upsampled(convolve, x, kernel), x, kernel)
    true, true_pullback = jax.vjp(lambda x, kernel: convolution.convolve_xla(upsample_2x(x), kernel), x, kernel)
    for mine, exact in zip((y, *pullback(g)), (true, *true_pullback(g)), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=2e-5)


@pytest.mark.whole
def test_network_with_matrix_products_equals_the_xla_network():
    fields = {**TINY, "scale_shift_norm": True, "num_heads": 2}
    x, time = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
    params = redraw(init(models.UNet(**fields)))

    def run(**more):
        model = models.UNet(**fields, **more)
        return jax.jit(jax.value_and_grad(lambda p: (model.apply({"params": p}, x, time) ** 2).mean()))(params)

    (loss, grads), (true, true_grads) = run(convolution="products"), run(convolution="xla")
    np.testing.assert_allclose(loss, true, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, true_grads)
    # In bfloat16 no further from float32 than XLA's own convolutions, loss and gradients.

    def error(dtype_run):
        flat = [
            np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]) for tree in (dtype_run, (true, true_grads))
        ]
        return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])

    by_products, by_xla = (run(dtype="bfloat16", convolution=how) for how in ("products", "xla"))
    assert error(by_products) < 1.2 * error(by_xla) and error(by_xla) < 0.05


def test_matrix_products_are_chosen_for_bfloat16_on_one_cpu(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert models.UNet(dtype="bfloat16").layers.use_matmul
    assert not models.UNet().layers.use_matmul
    assert not models.UNet(dtype="bfloat16", convolution="xla").layers.use_matmul
    monkeypatch.setattr("jax.device_count", lambda: 8)  # laying out would gather images from all of them
    assert not models.UNet(dtype="bfloat16").layers.use_matmul
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert not models.UNet(dtype="bfloat16").layers.use_matmul
