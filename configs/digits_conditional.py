"""Digits by class, with classifier-free guidance: samples of a requested digit after about two minutes on two CPU cores.

python main.py --config=configs/digits_conditional.py --workdir=runs/conditional
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """The digits network with ten classes; training drops each label with probability 0.1."""
    config = default()
    config.data.update(dataset="digits", image_size=8, channels=1, levels=17, random_flip=False)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=())
    config.model.update(num_groups=8, dropout=0.35, num_classes=10, label_dropout=0.1)
    config.diffusion.update(schedule="cosine", variance="fixed_small", timestep_sampler="stratified")
    config.training.update(num_steps=1500, batch_size=64, log_every=50, sample_every=500)
    config.training.update(checkpoint_every=500, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.ema.update(decay=0.998, warmup=True)
    config.sampling.update(steps=250, num_samples=100, batch_size=100, trajectory=12)
    config.evaluation.num_samples = 1000
    return config
