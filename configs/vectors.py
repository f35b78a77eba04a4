"""Vectors, with a multilayer perceptron: two moons, or vectors that depend on a condition.

    python main.py --config=configs/vectors.py --workdir=runs/moons
    python main.py --config=configs/vectors.py:conditional --workdir=runs/spiral
    python main.py --workdir=runs/moons --mode=sample

| argument | vectors |
|---|---|
| moons (the default) | two half circles with noise in the plane |
| conditional | points on a spiral in the plane; a number gives the position: `--config.sampling.conditions=FILE` |

`python benchmarks/known_distributions.py moons conditional` compares the samples with the exact distributions.
"""

from diffusion_jax.config import ConfigDict, default


def get_config(variant: str = "moons") -> ConfigDict:
    """variant: "moons" or "conditional"."""
    if variant not in ("moons", "conditional"):
        raise ValueError(f"vectors.py:{variant}: known are moons, conditional")
    config = default()
    config.data.update(dataset="diffusion_jax.data.synthetic:moons", image_size=(), channels=2)
    config.data.update(levels=None, random_flip=False)
    config.model.update(kind="mlp", channels=64, num_res_blocks=4, scale_shift_norm=True, dropout=0.0)
    config.diffusion.update(schedule="cosine", prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=8000, batch_size=256, sample_every=0)  # many steps: the moons are thin curves
    config.training.update(checkpoint_every=1000, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=100, schedule="cosine", decay_steps=8000)
    config.ema.update(decay=0.999, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=50, spacing="log_snr", num_samples=4000, batch_size=1000)
    config.evaluation.num_samples = 4000
    if variant == "conditional":
        config.data.dataset = "diffusion_jax.data.synthetic:conditional"
        config.model.update(channels=128, num_res_blocks=3, condition_features=1)
        config.training.num_steps = 4000
        config.optimizer.update(learning_rate=2e-3, decay_steps=4000)
    return config
