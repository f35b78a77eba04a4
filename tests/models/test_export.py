"""Past this machine: the train step and the samplers lower for TPUs and for CUDA, here, where there are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import training
from diffusion_jax.distributed import compiler
from diffusion_jax.runs.sampling_setup import BatchSampler, SamplingSetup
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
def test_samplers_lower_for_tpu_and_cuda(sampler):
    config = ConfigDict(tiny_config(**{"sampling.sampler": sampler, "sampling.steps": 15}).to_dict())
    config.diffusion.schedule = "linear"
    built = training.build_program(config)
    batch_sampler = BatchSampler(SamplingSetup(config, built.model, built.schedule, built.mesh), 2)
    args = (built.abstract_state.params, None, np.uint32(0), np.int32(0), None, None)
    text = exported(batch_sampler._sample_batch, *args)
    assert "stablehlo.while" in text


def test_gpu_options_are_known_to_the_compiler():
    """Their names and values: what they do shows only on a GPU."""
    jax.jit(lambda x: x + 1, compiler_options=compiler.DETERMINISTIC).lower(jnp.zeros(())).compile()
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": "1"}).lower(jnp.zeros(())).compile()
