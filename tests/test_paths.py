"""Paths: noise levels in continuous time, and schedules from them."""

import helpers.arrays as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import losses, process, schedules

