"""The published networks by name: the fields of `models.UNet` and `models.Classifier` that differ from the defaults.

`models.preset` builds the networks. Super-resolution networks use the small image as their condition (`models.upsampling`).
"""

from __future__ import annotations

from typing import Any

# The fields common to all OpenAI networks that differ from Ho et al.'s network.
OPENAI: dict[str, Any] = {
    "embedding_cos_first": True,
    "embedding_freq_shift": 0.0,
    "downsample_padding": (1, 1),
    "norm_epsilon": 1e-5,
    "initializer": "openai",
    "dropout": 0.0,
}
_IMPROVED = OPENAI | {"num_heads": 4, "scale_shift_norm": True, "num_res_blocks": 3, "out_channels": 6}
_ADM = OPENAI | {"channels": 256, "scale_shift_norm": True, "resample_blocks": True, "out_channels": 6}
_EDM = _ADM | {"head_channels": 64, "dropout": 0.1, "out_channels": 3, "time_scale": 1000.0}  # of consistency_models
_CLASSIFIER = OPENAI | {"scale_shift_norm": True, "resample_blocks": True, "head_channels": 64, "num_classes": 1000}
_UPSAMPLER = {
    "channels": 192,
    "channel_multipliers": (1, 1, 2, 2, 4, 4),
    "num_classes": 1000,
    "condition_channels": 3,
}

# Channel multipliers of OpenAI's networks by image size.
_MULTIPLIERS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _fields_at(pixels: int) -> dict[str, Any]:
    """Returns the fields that depend on the image size; ADM has attention at 32, 16 and 8 pixels."""
    multipliers = _MULTIPLIERS[pixels]
    levels = tuple(i for i in range(len(multipliers)) if pixels >> i in (32, 16, 8))
    return {"channel_multipliers": multipliers, "attention_levels": levels}


_EDM_IMAGENET64 = {"channels": 192, "num_res_blocks": 3, "num_classes": 1000}

UNET_PRESETS: dict[str, dict[str, Any]] = {
    "ddpm_cifar10": {"out_channels": 3},
    "ddpm_256": {
        "channel_multipliers": (1, 1, 2, 2, 4, 4),
        "attention_levels": (4,),
        "dropout": 0.0,
        "out_channels": 3,
    },
    "improved_cifar10": _IMPROVED | {"attention_levels": (1, 2), "dropout": 0.3},
    "improved_imagenet64": _IMPROVED | {"channel_multipliers": _MULTIPLIERS[64], "attention_levels": (2, 3)},
    "improved_imagenet64_conditional": _IMPROVED
    | {"channels": 192, "channel_multipliers": _MULTIPLIERS[64], "attention_levels": (2, 3), "num_classes": 1000},
    "improved_lsun": OPENAI | {"channel_multipliers": _MULTIPLIERS[256], "attention_levels": (4,), "out_channels": 6},
    "improved_upsampler_64_256": _IMPROVED | _UPSAMPLER | {"num_res_blocks": 2, "attention_levels": (4, 5)},
    "adm_imagenet64": _ADM
    | _fields_at(64)
    | {"channels": 192, "num_res_blocks": 3, "head_channels": 64, "dropout": 0.1, "num_classes": 1000},
    "adm_imagenet128": _ADM | _fields_at(128) | {"num_heads": 4, "num_classes": 1000},
    "adm_imagenet256": _ADM | _fields_at(256) | {"head_channels": 64, "num_classes": 1000},
    "adm_imagenet256_unconditional": _ADM | _fields_at(256) | {"head_channels": 64},
    "adm_imagenet512": _ADM | _fields_at(512) | {"head_channels": 64, "num_classes": 1000},
    "adm_lsun": _ADM | _fields_at(256) | {"head_channels": 64, "dropout": 0.1},
    "edm_imagenet64": _EDM | _fields_at(64) | _EDM_IMAGENET64,
    "edm_lsun": _EDM | _fields_at(256) | {"scale_shift_norm": False},
    "consistency_imagenet64": _EDM | _fields_at(64) | _EDM_IMAGENET64 | {"dropout": 0.0},
    "consistency_lsun": _EDM | _fields_at(256) | {"scale_shift_norm": False, "dropout": 0.0},
    "adm_upsampler_64_256": _ADM | _UPSAMPLER | {"attention_levels": (3, 4, 5), "num_heads": 4},
    "adm_upsampler_128_512": _ADM | _UPSAMPLER | {"attention_levels": (4, 5), "head_channels": 64},
}
CLASSIFIER_PRESETS: dict[str, dict[str, Any]] = {
    "adm_classifier64": _CLASSIFIER | _fields_at(64) | {"num_res_blocks": 4},
    "adm_classifier128": _CLASSIFIER | _fields_at(128),
    "adm_classifier256": _CLASSIFIER | _fields_at(256),
    "adm_classifier512": _CLASSIFIER | _fields_at(512),
}
PRESETS = (*UNET_PRESETS, *CLASSIFIER_PRESETS)
