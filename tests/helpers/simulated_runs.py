"""Work directories with the files of a run, made without training."""

import json

import numpy as np

from diffusion_jax import pictures
from diffusion_jax.config import experiment
from diffusion_jax.files import save_npz
from diffusion_jax.runs import workdir

START = 1_790_000_000.0
ENVIRONMENT = {
    "versions": {"diffusion_jax": "0.3.0", "jax": "0.10.2"},
    "system": "Linux",
    "cpus": 2,
    "devices": 1,
    "device_kind": "cpu",
    "backend": "cpu",
    "processes": 1,
}
SAMPLES = "step{step}_ema_ddim10_seed0_n{n}"


def simulated_lines(num_steps, log_every):
    """Lines of a log whose loss falls."""
    rng = np.random.default_rng(0)
    for step in range(log_every, num_steps + 1, log_every):
        noise = 1 + 0.1 * rng.standard_normal()
        loss = (0.02 + 0.5 / (1 + step / 200)) * noise
        yield {
            "step": step,
            "grad_norm": 0.3 * noise,
            "learning_rate": 2e-4,
            "loss": loss,
            **{f"loss_q{i}": loss * scale for i, scale in ((1, 2.5), (2, 1.0), (3, 0.4), (4, 0.1))},
            "param_norm": 50 + step**0.5 / 10,
            "images_per_second": 500.0,
            "seconds_left": 0.0,
            "step_seconds": 0.1,
            "compute": 0.95,
            "data_wait": 0.03,
            "logging": 0.02,
            "goodput": 0.9,
        }


def launch(first_step, last_step, start, end):
    """An entry of goodput.json."""
    seconds = dict.fromkeys(("train", "start", "compile", "restore", "save", "input", "output"), 1.0)
    steps = {"first_step": first_step, "last_step": last_step}
    times = {"start": START + start, "end": START + end, "seconds": seconds}
    return {**times, **steps, "parameters": 651_041, "environment": ENVIRONMENT}


def write_log(directory, num_steps=1000, log_every=50, launches=()):
    """config.json, metrics.jsonl and goodput.json."""
    config = experiment("digits_conditional")
    config.training.num_steps = num_steps
    config.training.log_every = log_every
    directory.mkdir(parents=True, exist_ok=True)
    workdir.write_config(config, directory)
    lines = simulated_lines(num_steps, log_every)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launches = list(launches) or [launch(0, num_steps, 0, 3600)]
    (directory / "goodput.json").write_text(json.dumps(launches))


def write_results(directory, classes=("zero", "one", "two")):
    """Samples with classes, pictures during training, a trajectory, metrics and a likelihood."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    samples = directory / "samples"
    samples.mkdir(exist_ok=True)
    (directory / "data.json").write_text(json.dumps({"images": 1498, "sha256_of_some": "ab", "classes": list(classes)}))
    for step in (250, 500, 750, 1000):
        pictures.save(samples / f"train_step{step:08d}.png", pictures.draw_grid(np.roll(images, step // 250, axis=0)))
    name = SAMPLES.format(step=1000, n=12)
    labels = np.arange(12, dtype=np.int32) % len(classes)
    save_npz(samples / f"{name}.npz", {"arr_0": images, "arr_1": labels})
    pictures.save(samples / f"{name}.png", pictures.draw_grid(images))
    frames = rng.integers(0, 256, (2, 5, 4, 8, 8, 1), np.uint8)
    arrays = {"x_t": frames[0], "x_0": frames[1], "times": np.linspace(999.0, 99.0, 5), "samples": images[:4]}
    (samples / "trajectories").mkdir(exist_ok=True)
    save_npz(samples / "trajectories" / f"{name}.npz", arrays)
    memorization = f"memorization_{name}_abcdef.png"
    distances = np.array([[0.5, 0.7, 0.9], [1.1, 1.2, 1.3]])
    pairs = pictures.draw_neighbors(images[:2], [0, 1], np.stack([images[1:4]] * 2), distances, "Pairs")
    pictures.save(directory / memorization, pairs)
    record = {
        "frechet_distance": 3.6756,
        "kernel_distance": 0.10675,
        "kernel_distance_standard_error": 0.036,
        "memorization": {"close_distance": 0.97, "close_share": 0.01, "picture": memorization},
        "notes": {"frechet_distance": "12 samples for 64 dimensions"},
        "reference": "digits:train",
        "samples": f"{name}.npz",
        "num_samples": 12,
        "features": "digits",
        "dataset": "digits",
        "weights": "ema",
        "step": 1000,
        "steps": 10,
        "sampling": {"sampler": "ddim", "num_samples": 12, "seed": 0},
    }
    (directory / "metrics.json").write_text(json.dumps([record]))
    likelihood = {"bits_per_dim": 3.21, "bits_per_dim_standard_error": 0.02, "prior": 1e-5, "decoder": 0.3}
    likelihood |= {"weights": "ema", "step": 1000, "dataset": "digits", "split": "test", "num_examples": 100}
    (directory / "likelihood.json").write_text(json.dumps(likelihood))


def write_run(directory):
    """A run that was killed once, finished, sampled and measured."""
    launches = [launch(0, 600, 0, 1000), launch(400, 1000, 1500, 2600)]
    write_log(directory, launches=launches)
    write_results(directory)
    (directory / "checkpoints" / "300.unreadable").mkdir(parents=True)
    (directory / "checkpoints" / "500.partial").mkdir()
