"""Time series with one spatial axis: 64 positions and 2 channels, from a synthetic process with a known distribution.

    python main.py --config=configs/series.py --workdir=runs/series
    python main.py --workdir=runs/series --mode=sample

The series are a damped oscillation with delays, and rough noise. `python benchmarks/known_distributions.py series` compares
the samples with the exact distribution. The network predicts v: without a clip of x_0, a network that predicts eps amplifies
its errors at the first steps of a deterministic sampler.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A small network that predicts v, for series with two channels."""
    config = default()
    config.data.update(dataset="diffusion_jax.data.synthetic:series", image_size=(64,), channels=2)
    config.data.update(levels=None, random_flip=False)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(), num_groups=8)
    config.model.update(dropout=0.0, scale_shift_norm=True)
    config.diffusion.update(prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=3000, batch_size=64, log_every=100, sample_every=1000, checkpoint_every=1000)
    config.training.checkpoint_keep_every = 0
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", decay_steps=3000)
    config.ema.update(decay=0.999, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", spacing="log_snr", steps=50, num_samples=1000, batch_size=250)
    config.evaluation.update(num_samples=1000, num_examples=1000, strata=50)
    return config
