"""Improved DDPM's CIFAR-10 model (Nichol & Dhariwal 2021): 52,546,438 parameters, T = 4000, 500,000 steps of batch 128.

    python main.py --config=configs/cifar10_improved.py --workdir=DIR
    python main.py --config=configs/cifar10_improved.py:vlb --workdir=DIR

The first command trains the hybrid loss, the second the variational bound with importance-sampled timesteps. Published
results: hybrid FID 3.19; vlb FID 11.47 and 2.94 bits per dimension (4,000 steps, EMA weights). Expected, not measured: days
on one current GPU. `--config.sampling.steps=250 --config.sampling.spacing=openai` samples in 250 of the steps, and

    python main.py --workdir=DIR --mode=evaluate --config.evaluation.strata=50

estimates the bits per dimension of the test images.
"""

from diffusion_jax.config import ConfigDict, default


def get_config(loss: str = "hybrid") -> ConfigDict:
    """loss: "hybrid" or "vlb"."""
    if loss not in ("hybrid", "vlb"):
        raise ValueError(f"cifar10_improved.py:{loss}: known are hybrid, vlb")
    config = default()
    config.data.random_flip = False
    config.model.update(num_res_blocks=3, attention_levels=(1, 2), num_heads=4, scale_shift_norm=True)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", dropout=0.3)
    config.diffusion.update(schedule="cosine", num_timesteps=4000, rescale_timesteps=True)
    config.diffusion.update(variance="learned_range", loss="hybrid")
    config.training.num_steps = 500_000
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    if loss == "vlb":
        config.diffusion.update(loss="vlb", timestep_sampler="loss_second_moment")
    return config
