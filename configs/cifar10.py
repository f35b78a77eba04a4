"""DDPM's CIFAR-10 model (Ho et al. 2020): 35,746,307 parameters, 800,000 steps of batch 128.

    python main.py --config=configs/cifar10.py --workdir=DIR

Published result: FID 3.17 on 50,000 samples with the EMA weights and 1,000 ancestral steps. Expected time, not measured: Ho
et al. report 21 steps a second on a TPU v3-8, so about 11 hours there. To try the config on a laptop:

    python main.py --config=configs/cifar10.py --workdir=DIR --config.training.batch_size=8 --config.training.num_steps=4
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Section 4 and appendix B of the paper; warm-up and gradient clipping as in the published code."""
    config = default()
    config.data.update(dataset="cifar10", image_size=32, channels=3, random_flip=True)
    config.model.update(channels=128, channel_multipliers=(1, 2, 2, 2), num_res_blocks=2, dropout=0.1)
    config.model.attention_levels = (1,)  # at 16x16 pixels
    config.diffusion.update(schedule="linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    config.diffusion.update(loss="simple", prediction="eps", variance="fixed_large")
    config.training.update(num_steps=800_000, batch_size=128)
    config.optimizer.update(name="adam", learning_rate=2e-4, warmup_steps=5_000, grad_clip=1.0)
    config.ema.decay = 0.9999
    config.sampling.update(sampler="ddpm", steps=None)  # all timesteps
    config.evaluation.num_samples = 50_000
    return config
