"""Volumes on a torus: a synthetic Gaussian field of 8x8x8 positions whose spectrum is known.

    python main.py --config=configs/volume.py --workdir=runs/volume
    python main.py --workdir=runs/volume --mode=sample

The samples are compared with the exact law by `python benchmarks/known_laws.py volume`.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As field.py, with three periodic axes of 8 positions, one channel and half the width."""
    config = experiment("field")
    config.data.update(dataset="diffusion_jax.data.synthetic:volume", image_size=(8, 8, 8), channels=1)
    config.model.channels = 16
    config.training.update(num_steps=800, batch_size=16)
    config.optimizer.decay_steps = 800
    config.evaluation.num_examples = 250
    return config
