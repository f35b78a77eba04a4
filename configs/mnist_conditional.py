"""MNIST by class, with classifier-free guidance, small enough for a CPU.

python main.py --config=configs/mnist_conditional.py --workdir=DIR
python main.py --workdir=DIR --mode=sample --config.sampling.label=7 --config.sampling.guidance_scale=2
"""

from diffusion_jax.config import ConfigDict, default


def get_config() -> ConfigDict:
    """A narrow network with ten classes; training drops each label with probability 0.1; DPM-Solver++ with 25 steps."""
    config = default()
    config.data.update(dataset="mnist", image_size=28, channels=1, random_flip=False)
    config.model.update(channels=24, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_levels=())
    config.model.update(num_groups=8, dropout=0.0, num_classes=10, label_dropout=0.1)
    config.diffusion.update(schedule="cosine", variance="fixed_small", timestep_sampler="stratified")
    config.training.update(num_steps=1500, batch_size=64, log_every=50, sample_every=500)
    config.training.update(checkpoint_every=500, checkpoint_keep_every=0)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100)
    config.ema.update(decay=0.995, warmup=True)
    config.sampling.update(sampler="dpm_solver_pp", steps=25, spacing="log_snr", num_samples=100, batch_size=100)
    return config
