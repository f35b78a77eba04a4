"""The names that the timestep samplers for paths had in version 0.3; use `timesteps` instead."""

from diffusion_jax import timesteps
from diffusion_jax.timesteps import log_normal, logit_normal, uniform_log_snr
from diffusion_jax.types import TimestepSampler

__all__ = ["log_normal", "logit_normal", "uniform", "uniform_log_snr"]


def uniform(*, stratified: bool = True) -> TimestepSampler:
    """Returns `timesteps.stratified`, or `timesteps.uniform` if `stratified` is False."""
    return timesteps.stratified if stratified else timesteps.uniform
