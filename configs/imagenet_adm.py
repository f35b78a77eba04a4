"""ADM's larger ImageNet models (Dhariwal & Nichol 2021), at 128, 256 or 512 pixels.

    python main.py --config=configs/imagenet_adm.py --workdir=DIR
    python main.py --config=configs/imagenet_adm.py:128 --workdir=DIR

| argument | parameters | steps of batch 256 | published FID, with the classifier's guidance |
|---|---|---|---|
| 128 | 421,529,606 | 4,360,000 | 2.97 |
| 256 (the default) | 553,838,086 | 1,980,000 | 4.59 |
| 256_unconditional | 552,814,086 | 1,980,000 | |
| 512 | 558,997,638 | 1,940,000 | 7.72 |

Expected, not measured: years on one current GPU; these are for pods. `--config.model.dtype=bfloat16` and
`--config.model.remat=True` save memory. Needs the TFDS set imagenet2012, whose files TFDS asks you to download by hand. The
guiding classifiers are imagenet_classifier.py's, the upsamplers imagenet256_upsample.py and imagenet512_upsample.py.
"""

from diffusion_jax.config import ConfigDict, default, experiment, preset_fields

_STEPS = {"128": 4_360_000, "256": 1_980_000, "256_unconditional": 1_980_000, "512": 1_940_000}


def get_config(variant: str = "256") -> ConfigDict:
    """variant: "128", "256", "256_unconditional" or "512"."""
    if variant not in _STEPS:
        raise ValueError(f"imagenet_adm.py:{variant}: known are {', '.join(_STEPS)}")
    config = experiment("imagenet64_adm")
    config.data.update(dataset="imagenet2012", image_size=int(variant.split("_")[0]))
    config.model = default().model
    config.model.update(preset_fields(f"adm_imagenet{variant}"))
    config.diffusion.schedule = "linear"
    config.training.update(num_steps=_STEPS[variant], batch_size=256)
    config.optimizer.learning_rate = 1e-4
    config.sampling.update(num_samples=16, batch_size=16)
    return config
