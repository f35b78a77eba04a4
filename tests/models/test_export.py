"""Past this machine: the train step and the samplers lower for TPUs and for CUDA, here, where there are none."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from diffusion_jax import pretrained, training
from diffusion_jax.distributed import devices
from diffusion_jax.pretrained import model
from diffusion_jax.runs.sampling import draw_batch, resolve_sampling
from helpers.configs import a_batch, tiny_config

PLATFORMS = ("tpu", "cuda")


def exported(function, *args):
    """The text of a jitted function's program for the two platforms."""
    out = jax.export.export(function, platforms=PLATFORMS)(*args)
    assert out.platforms == PLATFORMS
    return out.mlir_module()


@pytest.mark.whole
@pytest.mark.parametrize(
    "overrides",
    [
        {
            "model.dtype": "bfloat16",
            "model.remat": True,
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
    assert "stablehlo.convolution" in exported(built.train_step, built.abstract_state, batch)


@pytest.mark.whole
@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver_pp"])
def test_samplers_lower_for_tpu_and_cuda(sampler, monkeypatch):
    config = ConfigDict(tiny_config(**{"sampling.sampler": sampler, "sampling.steps": 15}).to_dict())
    config.diffusion.schedule = "linear"
    built = training.build_program(config)
    net = pretrained.from_config(config, built.abstract_state.params, mesh=built.mesh)
    program, texts = model._draw_on_mesh(built.mesh), []

    def lower(*args):
        texts.append(exported(program, *args))
        return jnp.zeros((2, 8, 8, 1))

    monkeypatch.setattr(model, "_draw_on_mesh", lambda mesh: lower)
    draw_batch(net, resolve_sampling(config, net), 0, 0, 2)
    assert "stablehlo.while" in texts[0]


def test_gpu_options_are_known_to_the_compiler():
    """Their names and values: what they do shows only on a GPU."""
    jax.jit(lambda x: x + 1, compiler_options=devices.DETERMINISTIC).lower(jnp.zeros(())).compile()
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": "1"}).lower(jnp.zeros(())).compile()
