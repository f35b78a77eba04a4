"""Lowered programs: the products' precision, and programs for TPUs and CUDA, without the devices."""

import re

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import models, training
from diffusion_jax.distributed import devices
from diffusion_jax.evaluation import ode_likelihood
from helpers.configs import a_batch, classifier_config, tiny_config


@pytest.mark.thorough
@pytest.mark.parametrize(
    "overrides",
    [
        {
            "model.dtype": "bfloat16",
            "model.remat": True,
            "model.channel_multipliers": (1, 2),
            "model.attention_levels": (1,),
            "training.accumulation_steps": 2,
        },
        {"diffusion.loss": "hybrid", "diffusion.variance": "learned_range", "model.num_classes": 10},
    ],
    ids=["bfloat16", "hybrid"],
)
def test_train_step_lowers_for_tpu_and_cuda(overrides):
    config = tiny_config(**overrides)
    built = training.build_program(config)
    batch = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype), a_batch(config))
    exported = jax.export.export(built.train_step, platforms=("tpu", "cuda"))(built.abstract_state, batch)
    assert "stablehlo.convolution" in exported.mlir_module()


def test_gpu_options_are_known_to_the_compiler():
    """The compiler accepts the options' names and values, and no other name; the effect is visible only on a GPU."""

    def compile_with(options):
        return jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.zeros(())).compile()

    assert compile_with(devices.DETERMINISTIC)(jnp.zeros(())) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        compile_with({"xla_gpu_no_such_option": True})


SMALL = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4}
NETWORKS = {
    "images": models.UNet(**SMALL),
    "adm": models.UNet(**SMALL, resample_blocks=True, scale_shift_norm=True, num_classes=3, remat=True),
    "periodic": models.UNet(**SMALL, padding="periodic", condition_features=2),
    "volumes": models.UNet(**SMALL | {"channel_multipliers": (1,), "attention_levels": ()}, spatial_dims=3),
    "classifier": models.Classifier(
        **SMALL, resample_blocks=True, scale_shift_norm=True, head_channels=8, num_classes=3
    ),
    "vectors": models.MLP(channels=8, condition_features=2),
}


def precisions(text: str) -> set[str]:
    """The precisions of products and convolutions in a lowered program, without the norms, which are always precise."""
    functions = [each for each in text.split("func.func ") if "@_normalize" not in each.splitlines()[0]]
    lines = [
        line
        for each in functions
        for line in each.splitlines()
        if re.search(r"stablehlo\.(dot_general|convolution)\b", line)
    ]
    assert lines
    return {name for line in lines for name in re.findall(r"DEFAULT|HIGHEST|HIGH", line) or ["DEFAULT"]}


def gradient(model):
    """Lowers the gradient of a network's output with respect to parameters and input."""
    shape = (4,) * getattr(model, "spatial_dims", 0) + (3,)
    inputs = models.initial_inputs(model, shape)
    if isinstance(model, models.Classifier):
        inputs.pop("y", None)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]

    def loss(params, x_t):
        return jnp.square(model.apply({"params": params}, **inputs | {"x_t": x_t})).sum()

    return jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs["x_t"]).as_text()


@pytest.mark.parametrize(
    "name",
    [
        "images",
        "vectors",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in NETWORKS if n not in ("images", "vectors")),
    ],
)
def test_every_product_of_a_network_and_of_its_gradient_has_the_precision(name):
    assert precisions(gradient(NETWORKS[name].clone(precision="highest"))) == {"HIGHEST"}


def test_the_default_high_and_an_unknown_precision():
    model = NETWORKS["vectors"]
    assert precisions(gradient(model)) == {"DEFAULT"}
    assert precisions(gradient(model.clone(precision="high"))) == {"HIGH"}
    with jax.default_matmul_precision("highest"):  # the default follows this setting
        assert precisions(gradient(model)) == {"HIGHEST"}
    for kind in ("vectors", "images"):
        with pytest.raises(ValueError, match="precision='double' must be 'default', 'high' or 'highest'"):
            gradient(NETWORKS[kind].clone(precision="double"))


@pytest.mark.thorough
@pytest.mark.parametrize("make_config", [tiny_config, classifier_config])
def test_the_setting_sets_the_precision_of_the_train_step(make_config):
    config = make_config(**{"model.precision": "highest", "training.accumulation_steps": 2})
    program = training.build_program(config)
    text = program.train_step.lower(program.abstract_state, a_batch(config)).as_text()
    assert precisions(text) == {"HIGHEST"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["images", "volumes"])
def test_gradients_in_a_loop_have_convolutions_that_are_fast_on_cpus(name):
    """Other orders of the kernel's axes take 20 times as long in a loop."""
    model = NETWORKS[name].clone(resample_blocks=True)
    inputs = models.initial_inputs(model, (4,) * model.spatial_dims + (3,))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]

    def descend(params, x_t):
        def step(x_t, _):
            y, transposed = jax.vjp(lambda x_t: model.apply({"params": params}, **inputs | {"x_t": x_t}), x_t)
            return transposed(y)[0], None

        return jax.lax.scan(step, x_t, length=2)[0]

    text = jax.jit(descend).lower(params, inputs["x_t"]).compile().as_text()
    orders = set(re.findall(r"dim_labels=\S+_\d+(\w\w)->", text))
    assert orders == {"io"}, orders


@pytest.mark.thorough
def test_ode_likelihoods_use_full_float32_by_default():
    program = training.build_program(tiny_config())

    def bits(params, x_0):
        def network(x_t, time):
            return program.model.apply({"params": params}, x_t, time)

        return ode_likelihood.bits_per_dim(
            jax.random.key(0), program.schedule, network, x_0, dequantization="variational"
        )

    text = jax.jit(bits).lower(program.abstract_state.params, jnp.zeros((2, 8, 8, 1))).as_text()
    assert precisions(text) == {"HIGHEST"}
