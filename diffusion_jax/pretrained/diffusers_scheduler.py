"""The configs of diffusers' schedulers, to and from leaves of `config.diffusion`.

Every field is used, ignored because it is an option of a sampler, or raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import PretrainedError, list_names
from diffusion_jax.pretrained.description import DIFFUSION_DEFAULTS, Description, make_clip

__all__ = ["SchedulerSettings", "scheduler_from_config", "scheduler_to_config"]

# Schedulers of the DDPM process, and whether each clips x_0 by default.
_SCHEDULERS = {
    "DDPMScheduler": True,
    "DDIMScheduler": True,
    "DDIMInverseScheduler": True,
    "PNDMScheduler": False,
    "DEISMultistepScheduler": False,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "UniPCMultistepScheduler": False,
}
_SCHEDULER_FIELDS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "rescale_betas_zero_snr",
    "thresholding",
}
# Options of samplers with fewer steps, which do not describe the weights.
_STEP_FIELDS = {
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "set_alpha_to_zero",
    "skip_prk_steps",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
    "lambda_min_clipped",
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "use_lu_lambdas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "tensor_format",  # of versions before 0.4
}

_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


class SchedulerSettings(NamedTuple):
    """leaves: of `config.diffusion`. betas: float64 [T] if the config has a table of them. clip: as the samplers take it."""

    leaves: dict[str, Any]
    betas: np.ndarray | None
    clip: bool | Callable


def scheduler_from_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """The settings in a scheduler's config. Raises: PretrainedError that names the field which is not supported."""
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    variance = config.get("variance_type") or "fixed_small"
    for name, value, known in (
        ("beta_schedule", kind, _SCHEDULES),
        ("prediction_type", prediction, _PREDICTIONS),
        ("variance_type", variance, _VARIANCES),
    ):
        if value not in known:
            raise PretrainedError(f"the scheduler's {name}={value!r} is not supported; known: {', '.join(known)}")
    class_name = config.get("_class_name", "DDPMScheduler")
    if class_name not in _SCHEDULERS:
        raise PretrainedError(
            f"the scheduler's _class_name={class_name!r} is not supported; known: {', '.join(_SCHEDULERS)}"
        )
    unknown = sorted(n for n in config if n not in _SCHEDULER_FIELDS | _STEP_FIELDS and not n.startswith("_"))
    if unknown:
        raise PretrainedError(
            f"the scheduler's {list_names(unknown)} is unknown; known: {list_names(sorted(_SCHEDULER_FIELDS), 99)}"
        )
    table = config.get("trained_betas")
    for name in ("rescale_betas_zero_snr", "thresholding"):
        if config.get(name):
            raise PretrainedError(f"the scheduler's {name}=True is not supported")
    clip: bool | Callable = config.get("clip_sample", _SCHEDULERS[class_name])
    if not isinstance(clip, bool):
        raise PretrainedError(f"the scheduler's clip_sample={clip!r} must be true or false")
    bound = float(config.get("clip_sample_range", 1.0))
    if clip and bound != 1:
        clip = make_clip(bound)
    leaves = {
        "schedule": _SCHEDULES[kind],
        "num_timesteps": len(table) if table is not None else config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "prediction": _PREDICTIONS[prediction],
        "variance": _VARIANCES[variance],
    }
    return SchedulerSettings(leaves, None if table is None else np.asarray(table, np.float64), clip)


def scheduler_to_config(description: Description) -> dict[str, Any]:
    """The config of DDPMScheduler. Raises: PretrainedError that names a field which DDPMScheduler does not support."""
    schedule = description.schedule
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise PretrainedError("rescale_timesteps: the network time of diffusers is the index itself")
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if description.prediction not in predictions:
        raise PretrainedError(f"prediction={description.prediction!r}: DDPMScheduler supports {', '.join(predictions)}")
    if description.variance not in _VARIANCES.values():
        raise PretrainedError(f"variance={description.variance!r}: DDPMScheduler does not support this variance")
    if not isinstance(description.clip, bool):
        raise PretrainedError("clip: DDPMScheduler supports only True and False")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": predictions[description.prediction],
        "variance_type": description.variance,
        "clip_sample": description.clip,
    }
    leaves = description.diffusion or {}
    schedule_names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if leaves.get("schedule") in schedule_names:
        return config | {
            "beta_schedule": schedule_names[leaves["schedule"]],
            "beta_start": leaves.get("beta_start", DIFFUSION_DEFAULTS["beta_start"]),
            "beta_end": leaves.get("beta_end", DIFFUSION_DEFAULTS["beta_end"]),
        }
    return config | {"trained_betas": [float(beta) for beta in schedule.betas]}
