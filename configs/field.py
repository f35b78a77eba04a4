"""Fields of five correlated channels on a torus: a synthetic Gaussian field whose spectrum is known.

    python main.py --config=configs/field.py --workdir=runs/field
    python main.py --workdir=runs/field --mode=sample

Convolutions continue the field periodically. The samples are compared with the exact law by
`python benchmarks/known_laws.py field`.
"""

from diffusion_jax.config import ConfigDict, experiment


def get_config() -> ConfigDict:
    """As series.py, with two periodic axes of 16 positions."""
    config = experiment("series")
    config.data.update(dataset="diffusion_jax.data.synthetic:field", image_size=(16, 16), channels=5)
    config.model.padding = "periodic"
    config.training.update(num_steps=1500, batch_size=32, sample_every=500, checkpoint_every=500)
    config.optimizer.decay_steps = 1500
    config.sampling.update(num_samples=500, batch_size=100)
    config.evaluation.update(num_samples=500, num_examples=500)
    return config
