"""Simulates patterns of two chemicals that react and diffuse, and writes them to `patterns/train.npz` and `test.npz`.

    python examples/reaction_diffusion.py

The chemicals have concentrations u and v [Pearson 1993, "Complex Patterns in a Simple System"]. u is fed, v consumes u and
grows, and v is removed at the feed rate plus the kill rate. The kill rate decides between holes, stripes and spots:

    du/dt = D_u laplacian(u) - u v^2 + feed (1 - u)
    dv/dt = D_v laplacian(v) + u v^2 - (feed + kill) v
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

EXAMPLES, SIZE, TIME = {"train": 2000, "test": 200}, 24, 6000
FEED, KILL = 0.037, (0.058, 0.065)
DIFFUSION = jnp.array([0.08, 0.04])
MAX_Z, KILL_ERROR, KILL_SHARE = 3, 0.001, 0.95  # the error bars of `compare`


def rates(fields, kill):
    """Returns d(fields)/dt for concentrations [N, H, W, 2] on a torus, with kill rates [N]."""
    u, v = fields[..., 0], fields[..., 1]
    reaction = u * v**2
    change = jnp.stack([FEED * (1 - u) - reaction, reaction - (FEED + kill[:, None, None]) * v], axis=-1)
    neighbors = sum(jnp.roll(fields, shift, axis) for axis in (1, 2) for shift in (-1, 1))
    return change + DIFFUSION * (neighbors - 4 * fields)


@jax.jit
def simulate(fields, kill, time):
    """Returns the concentrations after `time` Euler steps of length 1."""
    return jax.lax.fori_loop(0, time, lambda _, x: x + rates(x, kill), fields)


def draw(key, number):
    """Returns concentrations [N, H, W, 2] that grow from random droplets of v, and their kill rates [N]."""
    kill_key, droplet_key = jax.random.split(key)
    kill = jax.random.uniform(kill_key, (number,), minval=KILL[0], maxval=KILL[1])
    droplets = jax.random.bernoulli(droplet_key, 0.2, (number, SIZE // 4, SIZE // 4)).at[:, 0, 0].set(True)
    droplets = droplets.repeat(4, 1).repeat(4, 2)
    return simulate(jnp.stack([1 - 0.5 * droplets, 0.25 * droplets], axis=-1), kill, TIME), kill


def statistics(fields):
    """Returns numbers [N] by name for concentrations [N, H, W, 2].

    mean_v: the concentration of v. spots_minus_holes: the Euler characteristic of the positions with v > 0.2, where a stripe
    counts as one spot, and as none if it closes around the torus. wavelength: in positions, by the mean frequency of v. feed,
    kill: the rates at which the gains and the losses of each chemical are equal, summed over the positions.
    """
    u, v = np.moveaxis(np.asarray(fields, np.float64), -1, 0)
    spot = v > 0.2
    right, below = np.roll(spot, -1, 2), np.roll(spot, -1, 1)
    edges = (spot & right).sum((1, 2)) + (spot & below).sum((1, 2))
    squares = (spot & right & below & np.roll(right, -1, 1)).sum((1, 2))
    power = np.abs(np.fft.fft2(v - v.mean((1, 2), keepdims=True))) ** 2
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, v.shape[1:]), indexing="ij"))
    mean_u, mean_v, reaction = (x.mean((1, 2)) for x in (u, v, u * v**2))
    feed = reaction / (1 - mean_u)
    return {
        "mean_v": mean_v,
        "spots_minus_holes": spot.sum((1, 2)) - edges + squares,
        "wavelength": power.sum((1, 2)) / (power * frequency).sum((1, 2)),
        "feed": feed,
        "kill": reaction / mean_v - feed,
    }


def compare(reference, samples):
    """Compares the statistics of samples and of new simulations, which have the same kill rates in the same order.

    NAME_z: the mean over the samples minus the mean over the simulations, in standard errors for independent sets, which are
    too large for equal kill rates. kill_within_0.001: the share of samples whose kill rate differs by less than 0.001 from
    the simulation's, which equals the requested rate up to 0.00003. within_error_bars: 1 if each |z| is at most 3 and the
    share is at least 0.95, otherwise 0.
    """
    if len(reference) != len(samples):
        raise ValueError(
            f"{len(samples)} samples and {len(reference)} simulations; compare needs pairs with equal kill rates: "
            f"set evaluation.num_samples={len(reference)}"
        )
    one, other = statistics(reference), statistics(samples)
    errors = {name: np.hypot(*(x[name].std() / len(x[name]) ** 0.5 for x in (one, other))) for name in one}
    found = {f"{name}_z": (other[name].mean() - one[name].mean()) / errors[name] for name in one}
    share = np.mean(np.abs(other["kill"] - one["kill"]) < KILL_ERROR)
    passed = all(abs(z) <= MAX_Z for z in found.values()) and share >= KILL_SHARE
    return found | {"kill_within_0.001": share, "within_error_bars": float(passed)}


if __name__ == "__main__":
    folder = pathlib.Path("patterns")
    folder.mkdir(exist_ok=True)
    for seed, (split, number) in enumerate(EXAMPLES.items()):
        fields, kill = draw(jax.random.key(seed), number)
        np.savez(folder / f"{split}.npz", x=fields, condition=kill[:, None])
        print(f"{number:,} patterns: {folder / split}.npz")
