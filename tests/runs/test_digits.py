"""The demo's claims, with the demo's config: recognizable digits, all ten classes, and no copies. Takes minutes, so marked
slow."""

import sys

import numpy as np
import pytest

from diffusion_jax.runs import sample, train
from helpers.configs import digits_config
from helpers.paths import ROOT


@pytest.mark.slow
def test_generated_digits_look_like_digits(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from digits_quality import quality

    config = digits_config()
    config.sampling.update(num_samples=512, batch_size=128, trajectory=0)
    train.run(config, tmp_path)
    sample.run(config, tmp_path)
    with np.load(tmp_path / "samples" / f"step{config.training.num_steps}_ema_ddpm250_seed0_n512.npz") as arrays:
        figures = quality(arrays["arr_0"])
    print(figures)
    assert figures["confident"] > 0.6 and figures["rarest"] > 0.02 and figures["distance"] >= 1.0
