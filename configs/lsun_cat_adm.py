"""ADM's LSUN cat model at 256x256 (Dhariwal & Nichol 2021): network and training length as lsun_bedroom_adm.py.

    python main.py --config=configs/lsun_cat_adm.py --workdir=DIR

Published result: FID 5.57. Needs the TFDS set lsun/cat, which TFDS downloads and prepares.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """The unconditional network of imagenet_adm.py at 256 pixels, with dropout 0.1."""
    config = default()
    config.data.update(dataset="lsun/cat", image_size=256)
    config.model.update(channels=256, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(3, 4, 5))
    config.model.update(head_channels=64, resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai")
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.update(num_steps=500_000, batch_size=256)
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.sampling.update(steps=250, spacing="openai", num_samples=16, batch_size=16)
    config.evaluation.split = "validation"
    return config
