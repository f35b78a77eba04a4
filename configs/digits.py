"""Handwritten digits, 8x8, from scikit-learn: recognizable samples after 68 s on two cores of an AMD EPYC.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --workdir=runs/digits --mode=sample

`make demo` runs both commands, and evaluates. The network has 651,041 parameters. For better digits, train longer with the
same command and --config.training.num_steps=8000.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A small network, a fast rate and a short EMA, for a minute of training."""
    config = default()
    config.data.update(dataset="digits", image_size=8, channels=1, levels=17, random_flip=False)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(), num_groups=8)
    config.model.dropout = 0.35  # with 0, samples after 7,000 steps are too close to the 1,498 training images
    config.diffusion.update(schedule="cosine", variance="fixed_small", timestep_sampler="stratified")
    config.training.update(num_steps=1500, batch_size=64, log_every=50, sample_every=500, checkpoint_every=500)
    config.training.checkpoint_keep_every = 0
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.ema.update(decay=0.998, warmup=True)
    config.sampling.update(steps=250, num_samples=100, batch_size=100, trajectory=12)
    config.evaluation.num_samples = 1000
    return config
