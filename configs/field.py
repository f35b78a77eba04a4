"""Fields with five correlated channels on a torus: a synthetic Gaussian field with a known spectrum.

    python main.py --config=configs/field.py --workdir=runs/field
    python main.py --workdir=runs/field --mode=sample

Convolutions pad the field periodically. `python benchmarks/known_distributions.py field` compares the samples with the exact
distribution.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """As series.py, with two periodic axes of 16 positions."""
    config = default()
    config.data.update(dataset="diffusion_jax.data.synthetic:field", image_size=(16, 16), channels=5)
    config.data.update(levels=None, random_flip=False)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=())
    config.model.update(scale_shift_norm=True, padding="periodic", num_groups=8, dropout=0.0)
    config.diffusion.update(prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=1500, batch_size=32, sample_every=500)
    config.training.update(checkpoint_every=500, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", decay_steps=1500)
    config.ema.update(decay=0.999, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=50, spacing="log_snr", num_samples=500, batch_size=100)
    config.evaluation.update(num_examples=500, strata=50, num_samples=500)
    return config
