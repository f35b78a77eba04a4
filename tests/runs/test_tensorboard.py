"""TensorBoard's events: groups of numbers, the config, pictures, and what a relaunch writes again."""

import numpy as np
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from diffusion_jax.run_dir import RunDir
from diffusion_jax.runs.logging import RunMetrics
from helpers.configs import tiny_config
from helpers.work_directories import lines


def read_events(directory):
    events = event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return events


def test_numbers_are_in_groups_beside_the_config_and_pictures(tmp_path):
    scalars = {"loss": 1.0, "loss_q1": 2.0, "compute": 0.5, "grad_norm": 3.0, "frechet_distance": 4.0}
    picture = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    with RunMetrics(tiny_config(), RunDir(tmp_path), step=0) as metrics:
        metrics.write_scalars(2, scalars)
        metrics.write_image(2, "samples", picture, "Samples after 2 steps")
    events = read_events(tmp_path)
    groups = ("loss/loss", "loss/loss_q1", "time/compute", "optimizer/grad_norm", "metrics/frechet_distance")
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == dict(
        zip(groups, scalars.values(), strict=True)
    )
    assert lines(tmp_path, without=()) == [{"step": 2, **scalars}]
    (config,) = events.Tensors("config")
    assert '"num_steps": 4' in tensor_util.make_ndarray(config.tensor_proto).item().decode()
    (image,) = events.Images("samples")
    assert (image.step, image.height, image.width) == (2, 8, 6)


def test_a_relaunch_replaces_what_is_beyond_its_step(tmp_path):
    """The first launch is killed in the middle of a line and of an event."""
    for step in (0, 4):
        metrics = RunMetrics(tiny_config(), RunDir(tmp_path), step)
        for later in (3, 5, 7) if step == 0 else (5, 6):
            metrics.write_scalars(later, {"loss": float(step)})
        metrics.flush()
        if step == 0:
            for path in tmp_path.iterdir():
                path.write_bytes(path.read_bytes()[:-3])
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(3, 0.0), (5, 4.0), (6, 4.0)]
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss/loss")] == [
        (3, 0.0),
        (5, 4.0),
        (6, 4.0),
    ]
