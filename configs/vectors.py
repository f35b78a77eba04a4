"""Vectors, with a multilayer perceptron: two moons, or vectors that depend on a condition.

    python main.py --config=configs/vectors.py --workdir=runs/moons
    python main.py --config=configs/vectors.py:conditional --workdir=runs/spiral
    python main.py --workdir=runs/moons --mode=sample

| argument | vectors |
|---|---|
| moons (the default) | two half circles with noise in the plane |
| conditional | points on a spiral in the plane, at the place that a number gives: `--config.sampling.conditions=FILE` |

The samples are compared with the exact laws by `python benchmarks/known_laws.py moons conditional`.
"""

from diffusion_jax.config import ConfigDict, default

_VARIANTS = ("moons", "conditional")


def get_config(variant: str = "moons") -> ConfigDict:
    """variant: "moons" or "conditional"."""
    if variant not in _VARIANTS:
        raise ValueError(f"vectors.py:{variant}: known are {', '.join(_VARIANTS)}")
    config = default()
    config.data.update(dataset=f"diffusion_jax.data.synthetic:{variant}", image_size=(), channels=2)
    config.data.update(levels=None, random_flip=False)
    config.model.update(kind="mlp", channels=128, num_res_blocks=3, dropout=0.0, scale_shift_norm=True)
    config.model.condition_features = 1 if variant == "conditional" else 0
    config.diffusion.update(prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=4000, batch_size=256, log_every=100, sample_every=0, checkpoint_every=1000)
    if variant == "moons":  # sharp curves in two dimensions need more steps, and less width
        config.model.update(channels=64, num_res_blocks=4)
        config.training.num_steps = 8000
    config.training.checkpoint_keep_every = 0
    config.optimizer.update(warmup_steps=100, schedule="cosine", decay_steps=config.training.num_steps)
    config.optimizer.learning_rate = 3e-3 if variant == "moons" else 2e-3
    config.ema.update(decay=0.999, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", spacing="log_snr", steps=50, num_samples=4000, batch_size=1000)
    config.evaluation.num_samples = 4000
    return config
