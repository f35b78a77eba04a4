"""The sampler and the steps of `config.sampling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax import process, sampling, schedules

__all__ = [
    "SAMPLERS",
    "is_stochastic",
    "resolve_spacing",
    "respace",
    "sampler_from_config",
    "unused_leaves",
]


SAMPLERS: dict[str, Callable[..., sampling.Sampler]] = {
    "ddpm": lambda options, **arguments: sampling.ddpm(**arguments),
    "ddim": lambda options, **arguments: sampling.ddim(options["eta"], **arguments),
    "euler": lambda options, **arguments: sampling.euler(**arguments),
    "euler_ancestral": lambda options, **arguments: sampling.euler_ancestral(**arguments),
    "heun": lambda options, **arguments: sampling.heun(**arguments),
    "dpm_solver_pp": lambda options, **arguments: sampling.dpm_solver_pp(options["order"], **arguments),
    "unipc": lambda options, **arguments: sampling.unipc(options["order"], **arguments),
    "deis": lambda options, **arguments: sampling.deis(options["order"], **arguments),
    "pndm": lambda options, **arguments: sampling.pndm(**arguments),
    "plms": lambda options, **arguments: sampling.pndm(runge_kutta=False, **arguments),
}

# Leaves that only some samplers read: {leaf: (the value that has no effect, the samplers)}.
_READ_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "eta": (0.0, ("ddim",)),
    "order": (2, ("dpm_solver_pp", "unipc", "deis")),
}


def unused_leaves(options: Mapping) -> list[str]:
    """Leaves of `config.sampling` without effect, each with the setting that would use it."""
    unused = [
        f"sampling.{leaf}={options[leaf]!r} (only with sampling.sampler={', '.join(samplers)})"
        for leaf, (without_effect, samplers) in _READ_BY.items()
        if options[leaf] != without_effect and options["sampler"] not in samplers
    ]
    if options["classifier_scale"] != 1 and not options["classifier"]:
        unused.append(f"sampling.classifier_scale={options['classifier_scale']!r} (only with sampling.classifier)")
    for leaf in ("guidance_interval", "guidance_rescale"):
        if options[leaf] and options["guidance_scale"] == 1:
            unused.append(f"sampling.{leaf}={options[leaf]!r} (only with a sampling.guidance_scale other than 1)")
    return unused


def sampler_from_config(
    options: Mapping, parameterization: Mapping[str, Any], clip: Callable | None = None, **arguments
) -> sampling.Sampler:
    """The sampler of `config.sampling`, whose `clip` is resolved.

    parameterization: a mapping with `prediction` and `variance`, such as `config.diffusion`. clip: a function from the
    clipping of `sampling.clip` to the one to use instead. arguments: more arguments of the sampler.
    Raises: ValueError for values that the sampler does not take.
    """
    clipping = options["clip"]
    if clipping == "dynamic":
        clipping = process.dynamic_threshold(options["clip_quantile"])
    return SAMPLERS[options["sampler"]](
        options,
        clip=clipping if clip is None else clip(clipping),
        prediction=parameterization["prediction"],
        variance=parameterization["variance"],
        **arguments,
    )


def is_stochastic(options: Mapping) -> bool:
    """Whether two samples from the same x_T differ."""
    return options["sampler"] in ("ddpm", "euler_ancestral") or (options["sampler"] == "ddim" and options["eta"] > 0)


def resolve_spacing(options: Mapping, sampler: sampling.Sampler, schedule: schedules.Schedule) -> str:
    """`sampling.spacing`, or the default of the sampler and of the type of `sampling.steps`."""
    if options["spacing"] is not None:
        return options["spacing"]
    return "openai" if isinstance(options["steps"], tuple | list) else sampling.default_spacing(sampler, schedule)


def respace(schedule: schedules.Schedule, options: Mapping, sampler: sampling.Sampler) -> schedules.Schedule:
    """The schedule that the sampler uses: all of it, or `sampling.steps` of it. Raises: ValueError."""
    steps = options["steps"]
    if steps is None:
        return schedule
    try:
        return _respace(schedule, options, sampler)
    except ValueError as error:
        if str(error).startswith("sampling."):
            raise
        raise ValueError(f"sampling.steps={steps!r}: {error}") from error


def _respace(schedule: schedules.Schedule, options: Mapping, sampler: sampling.Sampler) -> schedules.Schedule:
    steps = options["steps"]
    spacing, is_sequence = resolve_spacing(options, sampler, schedule), isinstance(steps, tuple | list)
    if spacing == "given":
        if not is_sequence:
            raise ValueError(f"sampling.spacing='given' needs sampling.steps=(t, t, ...), network times, not {steps!r}")
        return schedules.respace(schedule, [float(t) for t in steps])
    if spacing == "openai":
        if not all(type(count) is int for count in (steps if is_sequence else (steps,))):
            raise ValueError(
                f"sampling.steps={steps!r} with spacing=openai must be a whole number, or several: (10, 15, 20)"
            )
        return schedules.respace(schedule, ",".join(map(str, steps)) if is_sequence else str(steps))
    if is_sequence:
        raise ValueError(
            f"sampling.steps={steps!r} are several numbers, which spacing={spacing} does not take; use "
            "sampling.spacing=openai (steps in equal sections of the chain) or given (network times)"
        )
    if spacing == "openai_ddim":
        return schedules.respace(schedule, f"ddim{steps}")
    return schedules.respace(schedule, steps, spacing)
