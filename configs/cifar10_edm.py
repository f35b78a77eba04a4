"""EDM's objective (Karras et al. 2022) on DDPM's U-Net with twice the blocks, for CIFAR-10.

    python main.py --config=configs/cifar10_edm.py --workdir=DIR

Noise levels, weights, preconditioning, optimizer, batch size and length as published for CIFAR-10 without classes.
Differences: Ho et al.'s U-Net instead of DDPM++ (--config.model.architecture=ddpm++ --config.model.resample_blocks=True is
DDPM++); flips as the only augmentation; the moving average warms up by
(1 + step) / (10 + step). Published result: FID 1.97 with 35 network calls. Expected, not measured: about 2 days on 8 V100,
as the authors report for their network.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Table 7 in appendix F of the paper; the sampler is table 1's, deterministic, with 18 levels."""
    config = default()
    config.data.update(dataset="cifar10", image_size=32, channels=3, random_flip=True)
    config.model.update(channels=128, channel_multipliers=(2, 2, 2), num_res_blocks=4, dropout=0.13)
    config.model.attention_levels = (1,)  # at 16x16 pixels
    config.diffusion.update(path="edm", draw="log_normal", draw_mean=-1.2, draw_std=1.2)
    config.diffusion.update(preconditioning="edm", prediction="x_0", weighting="edm", sigma_data=0.5)
    config.training.update(num_steps=390_625, batch_size=512)  # 200 million images
    config.optimizer.update(learning_rate=1e-3, warmup_steps=19_531, grad_clip=0.0)  # 10 million images
    config.ema.update(decay=0.99929, warmup=True)  # half of the weight in 500,000 images
    config.sampling.update(sampler="heun", steps=18, spacing="karras", clip=False)
    config.evaluation.num_samples = 50_000
    return config
