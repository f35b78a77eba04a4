"""MNIST, 28x28.

    python main.py --config=configs/mnist.py --workdir=DIR

Expected, not measured: about an hour on one current GPU. No published result; a successful run shows clean digits.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """DDPM's network at half width and three levels (28, 14, 7 pixels)."""
    config = default()
    config.data.update(dataset="mnist", image_size=28, channels=1, random_flip=False)
    config.model.update(channels=64, channel_multipliers=(1, 2, 2))
    config.training.update(num_steps=50_000, sample_every=5_000, checkpoint_every=2_500, checkpoint_keep_every=0)
    config.optimizer.warmup_steps = 1_000
    config.ema.decay = 0.999
    return config
