"""Training: builds the state and the compiled, sharded train step of a config; saves checkpoints."""

from diffusion_jax.training.batches import condition_shape
from diffusion_jax.training.from_config import (
    TrainingProgram,
    build_program,
    create,
    model_from_config,
    schedule_from_config,
    stored_normalizations,
)
from diffusion_jax.training.state import TrainState, mean_metrics
from diffusion_jax.training.step import scan_steps, sigma_data

__all__ = [
    "TrainState",
    "TrainingProgram",
    "build_program",
    "condition_shape",
    "create",
    "mean_metrics",
    "model_from_config",
    "scan_steps",
    "schedule_from_config",
    "sigma_data",
    "stored_normalizations",
]
