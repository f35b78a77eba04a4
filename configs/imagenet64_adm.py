"""ADM's ImageNet model at 64x64 (Dhariwal & Nichol 2021), with classes: 295,904,454 parameters.

    python main.py --config=configs/imagenet64_adm.py --workdir=DIR

540,000 steps of batch 2,048. Published result: FID 2.07 without guidance; imagenet_classifier.py:64 trains a classifier for
guidance. Expected, not measured: months on one current GPU. Needs imagenet_resized/64x64, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A cosine schedule, a learned variance, AdamW without warm-up."""
    config = default()
    config.data.update(dataset="imagenet_resized/64x64", image_size=64)
    config.model.update(channels=192, channel_multipliers=(1, 2, 3, 4), num_res_blocks=3, attention_levels=(1, 2, 3))
    config.model.update(head_channels=64, resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", num_classes=1000)
    config.diffusion.update(schedule="cosine", variance="learned_range", loss="hybrid")
    config.training.update(num_steps=540_000, batch_size=2048)
    config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=0, grad_clip=0.0)
    config.sampling.update(steps=250, spacing="openai")
    config.evaluation.split = "validation"
    return config
