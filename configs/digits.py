"""WIP."""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.data.update(dataset="digits", image_size=8, channels=1, random_flip=False)
    config.model.update(
        channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(), num_groups=8, dropout=0.0
    )
    config.diffusion.update(schedule="cosine", timestep_sampler="stratified", variance="fixed_small")
    config.training.update(num_steps=1500, batch_size=64, log_every=50, sample_every=500, checkpoint_every=500)
    config.training.checkpoint_keep_every = 0
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.ema.update(decay=0.995, warmup=True)
    config.sampling.update(steps=100, num_samples=100, batch_size=100, trajectory=12)
    return config
