"""Improved DDPM's CIFAR-10 model (Nichol & Dhariwal 2021): 52,546,438 parameters, T = 4000, 500,000 steps of batch 128.

    python main.py --config=configs/cifar10_improved.py --workdir=DIR
    python main.py --config=configs/cifar10_improved.py:vlb --workdir=DIR

The first trains the hybrid loss, the second the variational bound with importance-sampled timesteps. Published results:
hybrid FID 3.19, the vlb 11.47 and 2.94 bits per dimension (4,000 steps, EMA weights). Expected, not measured: days on one
current GPU. `--config.sampling.steps=250 --config.sampling.spacing=openai` samples in 250 of the steps, and

    python main.py --workdir=DIR --mode=evaluate --config.evaluation.strata=50

estimates the bits per dimension of the test images.
"""

from diffusion_jax.config import ConfigDict, default, preset_fields

_LOSSES = {
    "hybrid": {"loss": "hybrid", "timestep_sampler": "uniform"},
    "vlb": {"loss": "vlb", "timestep_sampler": "loss_second_moment"},
}


def get_config(loss: str = "hybrid") -> ConfigDict:
    """loss: "hybrid" or "vlb"."""
    if loss not in _LOSSES:
        raise ValueError(f"cifar10_improved.py:{loss}: known are {', '.join(_LOSSES)}")
    config = default()
    config.data.random_flip = False
    config.model.update(preset_fields("improved_cifar10"))
    config.diffusion.update(schedule="cosine", num_timesteps=4000, rescale_timesteps=True, variance="learned_range")
    config.diffusion.update(_LOSSES[loss])
    config.training.num_steps = 500_000
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    return config
