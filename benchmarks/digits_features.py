"""Trains the network of diffusion_jax/evaluation/features.py and prints its accuracy on held-out digits.

    python benchmarks/digits_features.py [--out=PATH]

The training set is the diffusion models' training set, shifted by up to a pixel. Training takes a few seconds on two cores.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from diffusion_jax.data import Digits
from diffusion_jax.evaluation.features import DIGITS_PATH, DigitsNetwork

STEPS, BATCH = 3000, 128


def main() -> None:
    """Trains, tests and saves the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=str(DIGITS_PATH), help="the file to write")
    options = parser.parse_args()
    (images, labels), held_out = (_read(split) for split in ("train", "test"))
    network = DigitsNetwork()
    params = network.init(jax.random.key(0), images[:1])["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=1e-3)

    @jax.jit
    def step(carry, key):
        params, state = carry
        key_batch, key_shift = jax.random.split(key)
        chosen = jax.random.randint(key_batch, (BATCH,), 0, len(images))
        shifts = jax.random.randint(key_shift, (BATCH, 2), -1, 2)
        batch = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images[chosen], shifts)

        def loss_fn(params):
            logits = network.apply({"params": params}, batch)[1]
            targets = optax.smooth_labels(jax.nn.one_hot(labels[chosen], 10), 0.1)
            return optax.softmax_cross_entropy(logits, targets).mean()

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    carry = params, optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        carry = step(carry, key)
    params = carry[0]
    for name, (x, y) in {"train": (images, labels), "test": held_out}.items():
        correct = network.apply({"params": params}, x)[1].argmax(-1) == y
        print(f"{name}: {float(correct.mean()):.4f} of {len(y)} correct")
    flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep=".")
    save_file({name: np.asarray(value) for name, value in flat.items()}, options.out)
    print(f"Written: {options.out}")


def _read(split: str):
    source = Digits(split, (8, 8), 1)
    return tuple(map(jnp.asarray, source.read(np.arange(len(source))).values()))


if __name__ == "__main__":
    main()
