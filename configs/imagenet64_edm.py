"""EDM's ImageNet model at 64x64 with classes (Karras et al. 2022), on ADM's network: 295.9M parameters.

    python main.py --config=configs/imagenet64_edm.py --workdir=DIR

Noise levels, weights, preconditioning, network, optimizer, batch size and length as published. Differences: the moving
average warms up by (1 + step) / (10 + step); float32 instead of float16. Published result: FID 1.36 with 511 network calls.
Expected, not measured: about 13 days on 32 A100, as the authors report. Needs imagenet_resized/64x64, which TFDS downloads
and prepares.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """Tables 5 and 7 of the paper: stochastic sampling with 256 levels."""
    config = default()
    config.data.update(dataset="imagenet_resized/64x64", image_size=64)
    config.model.update(channels=192, channel_multipliers=(1, 2, 3, 4), num_res_blocks=3, attention_levels=(1, 2, 3))
    config.model.update(head_channels=64, resample_blocks=True, scale_shift_norm=True, dropout=0.1)
    config.model.update(embedding_cos_first=True, embedding_freq_shift=0.0, downsample_padding=(1, 1))
    config.model.update(norm_epsilon=1e-5, initializer="openai", num_classes=1000)
    config.diffusion.update(path="edm", draw="log_normal", draw_mean=-1.2, draw_std=1.2)
    config.diffusion.update(preconditioning="edm", prediction="x_0", weighting="edm", sigma_data=0.5)
    config.training.update(num_steps=610_352, batch_size=4096)  # 2,500 million images
    config.optimizer.update(learning_rate=1e-4, warmup_steps=2_441, grad_clip=0.0)  # 10 million images
    config.ema.update(decay=0.999943, warmup=True)  # half of the weight in 50 million images
    config.sampling.update(sampler="heun", steps=256, spacing="karras", clip=False)
    config.sampling.update(churn=40.0, churn_range=(0.05, 50.0), churn_noise=1.003)
    config.evaluation.split = "validation"
    return config
