"""diffusers' network and scheduler configs: the defaults, and fields that are refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.pretrained import PretrainedError, diffusers
from helpers import torch_networks


def test_missing_fields_of_a_config_have_diffusers_defaults():
    """The published shapes also load with the library's defaults, whose values differ."""
    bare = diffusers.unet_from_config({"block_out_channels": [224, 448, 672, 896]})
    assert bare.embedding_cos_first is True and (bare.embedding_freq_shift, bare.head_channels) == (0, 8)
    assert bare.norm_epsilon == 1e-5
    assert bare.downsample_padding == (1, 1) and bare.attention_levels == (1, 2, 3)
    published = diffusers.unet_from_config(torch_networks.PUBLISHED)
    assert published == models.preset("ddpm_cifar10").clone(dropout=0.0)
    assert diffusers.unet_from_config(torch_networks.LARGE) == models.preset("ddpm_256")
    for field in ("downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps", "attention_head_dim"):
        without = {key: value for key, value in torch_networks.PUBLISHED.items() if key != field}
        assert diffusers.unet_from_config(without) != published, field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 7),
        ("resnet_time_scale_shift", "ada_group"),
        ("attn_norm_num_groups", 8),
        ("down_block_types", ["SkipDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("encoder_hid_dim", 3),
    ],
)
def test_unsupported_fields_are_named(field, value):
    with pytest.raises(PretrainedError, match=field):
        diffusers.unet_from_config({**torch_networks.PUBLISHED, field: value})


def test_scale_shift_without_a_norm_in_the_middle_is_named():
    with pytest.raises(PretrainedError, match="attn_norm_num_groups=None"):
        diffusers.unet_from_config({**torch_networks.IMPROVED, "attn_norm_num_groups": None})


def test_schedulers():
    settings, table, clip = diffusers.scheduler_from_config({})
    assert settings.items() >= {"schedule": "linear", "variance": "fixed_small", "prediction": "eps"}.items()
    assert table is None and clip is True
    settings, table, clip = diffusers.scheduler_from_config(
        {"trained_betas": [0.1, 0.2], "clip_sample_range": 2.0, "prediction_type": "v_prediction"}
        | {"variance_type": "fixed_large_log", "beta_schedule": "scaled_linear"}
    )
    assert (settings["prediction"], settings["variance"], settings["num_timesteps"]) == ("v", "fixed_large", 2)
    np.testing.assert_array_equal(table, [0.1, 0.2])
    np.testing.assert_array_equal(clip(jnp.array([-3.0, 1.5])), [-2.0, 1.5])
    assert diffusers.scheduler_from_config({"clip_sample": False})[2] is False
    assert diffusers.scheduler_from_config({"_class_name": "PNDMScheduler", "steps_offset": 1})[2] is False
    for field, value in (
        ("beta_schedule", "laplace"),
        ("prediction_type", "flow"),
        ("variance_type", "learned"),
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("_class_name", "CMStochasticIterativeScheduler"),
    ):
        with pytest.raises(PretrainedError, match=field):
            diffusers.scheduler_from_config({field: value})
