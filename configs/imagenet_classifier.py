"""ADM's noise-aware ImageNet classifiers (Dhariwal & Nichol 2021, section 4), for guidance, at 64, 128, 256 or 512 pixels.

    python main.py --config=configs/imagenet_classifier.py --workdir=DIR --mode=train_classifier
    python main.py --config=configs/imagenet_classifier.py:256 --workdir=DIR --mode=train_classifier

| pixels | parameters |
|---|---|
| 64 | 65,438,568 |
| 128 (where no size is named) | 42,568,040 |
| 256 | 54,096,360 |
| 512 | 54,448,360 |

300,000 steps of batch 256, as published for 128 pixels. Published FIDs with this guidance at 128, 256 and 512 pixels: 2.97,
4.59 and 7.72. One difference: images are resized and cropped in the middle, not at random. Expected, not measured: days on
one current GPU. Needs the TFDS data set imagenet2012, whose files TFDS asks you to download by hand; 64 pixels use
imagenet_resized/64x64, which TFDS downloads.
"""

from diffusion_jax.config import ConfigDict, default_classifier


def get_config(size: str = "128") -> ConfigDict:
    """size: "64", "128", "256" or "512"."""
    if size not in ("64", "128", "256", "512"):
        raise ValueError(f"imagenet_classifier.py:{size}: known are 64, 128, 256, 512")
    config = default_classifier()
    config.data.update(dataset="imagenet2012", image_size=128)
    config.model.update(channel_multipliers=(1, 1, 2, 3, 4), attention_levels=(2, 3, 4), head_channels=64)
    config.model.update(resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.0, num_classes=1000)
    config.training.update(num_steps=300_000, batch_size=256, checkpoint_every=10_000)
    config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=0, schedule="linear", decay_steps=300_000)
    config.optimizer.update(weight_decay=0.05, grad_clip=0.0)
    config.ema.decay = 0.0  # guidance uses the weights without averaging
    if size == "64":
        config.data.update(dataset="imagenet_resized/64x64", image_size=64)
        config.model.update(channel_multipliers=(1, 2, 3, 4), num_res_blocks=4, attention_levels=(1, 2, 3))
        config.diffusion.schedule = "cosine"  # as imagenet64_adm.py, the guided model
    if size == "256":
        config.data.image_size = 256
        config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(3, 4, 5))
    if size == "512":
        config.data.image_size = 512
        config.model.update(channel_multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention_levels=(4, 5, 6))
    return config
