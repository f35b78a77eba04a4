"""The train step with a one-parameter network that records its arguments."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffusion_jax import training
from diffusion_jax.training import optimizer
from diffusion_jax.training.state import initial_state
from diffusion_jax.training.step import find_terms, make_train_step


class Recorder:
    """A one-parameter network that records its arguments; the step runs without jit, so the arguments are numbers."""

    num_classes = 0

    def __init__(self, output, num_classes=0):
        self.calls, self.num_classes, self._output = [], num_classes, output

    @staticmethod
    def init(key, x_t, time, *labels):
        return {"params": {"w": jnp.ones(())}}

    def apply(self, variables, x_t, time, *labels, train, rngs, condition=None):
        self.calls.append(SimpleNamespace(x_t=x_t, time=time, labels=labels, train=train, condition=condition, **rngs))
        return self._output(variables["params"]["w"], x_t, time)


def recorded(config, output, num_classes=0):
    """(network, a state whose parameter is 1, the train step without jit)."""
    network, tx = Recorder(output, num_classes), optimizer.from_config(config.optimizer)
    terms = find_terms(config, network, schedule_of(config))
    state = initial_state(config, network, tx, (8, 8, 1), config["seed"], terms)
    state = state.replace(ema_params={"w": jnp.full((), 5.0)})
    rate = optimizer.learning_rate(config.optimizer)
    return network, state, make_train_step(config, network, schedule_of(config), tx, rate)


def schedule_of(config):
    return training.schedule_from_config(config.diffusion)


def floats(seed=0, batch_size=8):
    return np.random.default_rng(seed).normal(size=(batch_size, 8, 8, 1)).astype(np.float32)
