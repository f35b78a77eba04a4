"""Concentrations of two chemicals that react and diffuse: 24x24 positions on a torus, with the kill rate as a condition.

    python examples/reaction_diffusion.py
    python main.py --config=configs/patterns.py --workdir=runs/patterns

The first command makes the folder `patterns`.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A small periodic network that predicts v and gets one condition."""
    config = default()
    config.data.update(dataset="arrays", data_dir="patterns", image_size=(24, 24), channels=2, levels=None)
    config.data.update(random_flip=False, channel_names=("u", "v"))
    config.model.update(channels=24, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_levels=(), num_groups=8)
    config.model.update(dropout=0.0, padding="periodic", condition_features=1)
    config.diffusion.update(schedule="cosine", prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=2000, batch_size=32, log_every=50, sample_every=500)
    config.training.update(checkpoint_every=250, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", decay_steps=2000)
    config.ema.update(decay=0.998, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=50, spacing="log_snr", num_samples=32, trajectory=8)
    config.evaluation.update(likelihood=False, num_samples=200, reference_split="test")
    return config
