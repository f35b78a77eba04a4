"""Drawings of six classes, 16x16 pixels in color: good samples of a requested class in minutes on two CPU cores.

    python examples/drawings.py
    python main.py --config=configs/drawings.py --workdir=runs/drawings

The first command makes the folder `drawings`. For your own folder of images, set data.data_dir and model.num_classes.
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A small network that predicts v, with six classes; training drops each label with probability 0.1."""
    config = default()
    config.data.update(dataset="folder", data_dir="drawings", image_size=16, channels=3, random_flip=False)
    config.model.update(channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_levels=(), num_groups=8)
    config.model.update(dropout=0.0, num_classes=6, label_dropout=0.1)
    config.diffusion.update(schedule="cosine", prediction="v", timestep_sampler="stratified")
    config.training.update(num_steps=1500, batch_size=32, log_every=50, sample_every=500)
    config.training.update(checkpoint_every=250, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.ema.update(decay=0.997, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=25, spacing="trailing", guidance_scale=2.0)
    config.sampling.update(num_samples=96, batch_size=96, trajectory=12)
    config.evaluation.update(likelihood=False, num_samples=576, metrics=("memorization",))
    return config
