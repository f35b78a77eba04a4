"""Configs of tiny models of data that are not images, and their data as files."""

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.config import resolve

UNET = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (), "num_groups": 4}
MLP = {"kind": "mlp", "channels": 8, "num_res_blocks": 1}
# By name: the shape of an example, the leaves of `model`, and the shape of its condition.
KINDS = {
    "series": ((12, 2), UNET, None),
    "field": ((8, 6, 5), UNET | {"padding": "periodic"}, None),
    "volume": ((4, 4, 4, 1), UNET, None),
    "vectors": ((3,), MLP, None),
    "conditional_vectors": ((2,), MLP | {"condition_features": 2, "condition_dropout": 0.2}, (2,)),
    "conditional_series": ((8, 1), UNET | {"condition_channels": 1}, (8, 1)),
    "labeled_vectors": ((2,), MLP | {"condition_features": 2, "condition_dropout": 0.2, "num_classes": 3}, (2,)),
}
KINDS["labeled_vectors"][1]["label_dropout"] = 0.2
# Units far from those of the network.
OFFSET, SCALE = 100.0, 7.0


def array_data(kind: str, num_examples: int = 24) -> dict[str, np.ndarray]:
    """The arrays of a data set: "x", with channels of different scales, and "condition" and "label" if it has them."""
    shape, model, condition = KINDS[kind]
    rng = np.random.default_rng(0)
    scale = SCALE * (1 + np.arange(shape[-1]))
    arrays = {"x": (OFFSET + scale * rng.normal(size=(num_examples, *shape))).astype(np.float32)}
    if condition:
        arrays["condition"] = (5 + 3 * rng.normal(size=(num_examples, *condition))).astype(np.float32)
    if model.get("num_classes"):
        arrays["label"] = rng.integers(0, model["num_classes"], num_examples).astype(np.int32)
    return arrays


def array_config(kind: str, directory, **overrides) -> ConfigDict:
    """The config of a kind, of data that are written to a file in a directory."""
    shape, model, _ = KINDS[kind]
    path = directory / f"{kind}.npz"
    if not path.exists():
        np.savez(path, **array_data(kind))
    data = {"dataset": "arrays", "data_dir": str(path), "image_size": shape[:-1], "channels": shape[-1]}
    config = resolve(
        {
            "data": data | {"levels": None, "random_flip": False},
            "model": model | {"dropout": 0.0},
            "diffusion": {"num_timesteps": 20},
            "optimizer": {"warmup_steps": 0},
            "training": {"batch_size": 8, "num_steps": 2, "log_every": 2, "sample_every": 0, "checkpoint_every": 2},
            "sampling": {"num_samples": 3, "batch_size": 2, "steps": 4, "preview_samples": 0},
            "evaluation": {"num_samples": 0},
        }
    )
    config.update_from_flattened_dict(overrides)
    return config
