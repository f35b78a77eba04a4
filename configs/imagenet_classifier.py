"""ADM's noise-aware ImageNet classifiers (Dhariwal & Nichol 2021, section 4), for guidance, at 64, 128, 256 or 512 pixels.

    python main.py --config=configs/imagenet_classifier.py --workdir=DIR --mode=train_classifier
    python main.py --config=configs/imagenet_classifier.py:256 --workdir=DIR --mode=train_classifier

| pixels | parameters |
|---|---|
| 64 | 65,438,568 |
| 128 (where no size is named) | 42,568,040 |
| 256 | 54,096,360 |
| 512 | 54,448,360 |

300,000 steps of batch 256, as published for 128 pixels. Published results of guidance with them: FID 2.07, 2.97, 4.59 and
7.72. Where it differs: images are resized and cropped in the middle, not at random. Expected, not measured: days on one
current GPU. Needs the TFDS set imagenet2012, whose files TFDS asks you to download by hand; 64 pixels use
imagenet_resized/64x64, which TFDS downloads.
"""

from diffusion_jax.config import ConfigDict, default_classifier, preset_fields


def get_config(size: str = "128") -> ConfigDict:
    """size: "64", "128", "256" or "512"."""
    if size not in ("64", "128", "256", "512"):
        raise ValueError(f"imagenet_classifier.py:{size}: known are 64, 128, 256, 512")
    config = default_classifier()
    config.data.update(dataset="imagenet2012", image_size=int(size))
    config.model.update(preset_fields(f"adm_classifier{size}"))
    if size == "64":
        config.data.dataset = "imagenet_resized/64x64"
        config.diffusion.schedule = "cosine"  # as imagenet64_adm.py, which it guides
    config.training.update(num_steps=300_000, batch_size=256, checkpoint_every=10_000)
    config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=0, weight_decay=0.05, grad_clip=0.0)
    config.optimizer.update(schedule="linear", decay_steps=300_000)
    config.ema.decay = 0.0  # it is used as it is
    return config
