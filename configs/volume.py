"""Volumes on a torus: a synthetic Gaussian field on 8x8x8 positions with a known spectrum.

    python main.py --config=configs/volume.py --workdir=runs/volume
    python main.py --workdir=runs/volume --mode=sample

`python benchmarks/known_distributions.py volume` compares the samples with the exact distribution.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """As field.py, with three periodic axes of 8 positions, one channel and half the width."""
    config = default()
    config.data.update(dataset="diffusion_jax.data.synthetic:volume", image_size=(8, 8, 8), channels=1)
    config.data.update(levels=None, random_flip=False)
    config.model.update(channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=())
    config.model.update(scale_shift_norm=True, padding="periodic", num_groups=8, dropout=0.0)
    config.diffusion.update(prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=800, batch_size=16, sample_every=500)
    config.training.update(checkpoint_every=500, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", decay_steps=800)
    config.ema.update(decay=0.999, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=50, spacing="log_snr", num_samples=500, batch_size=100)
    config.evaluation.update(num_examples=250, strata=50, num_samples=500)
    return config
