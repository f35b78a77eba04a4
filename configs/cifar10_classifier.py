"""A noise-aware CIFAR-10 classifier, to guide cifar10.py's models: ADM's classifier for 32 pixels.

    python main.py --config=configs/cifar10_classifier.py --workdir=DIR --mode=train_classifier

5,096,138 parameters, 60,000 steps of batch 128. No published result. Expected, not measured: hours on one current GPU.
"""

from diffusion_jax.config import ConfigDict, default_classifier


def get_config() -> ConfigDict:
    """Three levels of 32, 16 and 8 pixels, with half the width of ADM's classifier and the diffusion model's schedule."""
    config = default_classifier()
    config.model.update(channels=64, channel_multipliers=(1, 2, 3), attention_levels=(1, 2), head_channels=64)
    config.model.update(resample_blocks=True, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.1, num_classes=10)
    config.training.num_steps = 60_000
    config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=0, schedule="linear", decay_steps=60_000)
    config.optimizer.update(weight_decay=0.05, grad_clip=0.0)
    config.ema.decay = 0.999
    return config
