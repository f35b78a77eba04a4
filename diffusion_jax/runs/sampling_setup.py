"""The sampler of `config.sampling` and its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax import process, sampling, schedules
from diffusion_jax.config import LEAVES

__all__ = [
    "LEAVES_WITHOUT_EFFECT",
    "SAMPLERS",
    "resolve_spacing",
    "respace",
    "sampler_from_config",
    "unused_leaves",
]

# The samplers by name, each with the leaves of `config.sampling` that only it reads, its first arguments.
SAMPLERS: dict[str, tuple[Callable[..., sampling.Sampler], tuple[str, ...]]] = {
    "ddpm": (sampling.ddpm, ()),
    "ddim": (sampling.ddim, ("eta",)),
    "euler": (sampling.euler, ()),
    "euler_ancestral": (sampling.euler_ancestral, ()),
    "heun": (sampling.heun, ()),
    "dpm_solver_pp": (sampling.dpm_solver_pp, ("order",)),
    "unipc": (sampling.unipc, ("order",)),
    "deis": (sampling.deis, ("order",)),
    "pndm": (sampling.pndm, ()),
    "plms": (functools.partial(sampling.pndm, runge_kutta=False), ()),
}
# Leaves of `config.sampling` that no sample depends on.
LEAVES_WITHOUT_EFFECT = ("preview_samples", "preview_steps", "trajectory", "batch_size", "use_ema")


def unused_leaves(options: Mapping) -> list[str]:
    """Leaves of `config.sampling` without effect, each with the setting that would use it."""
    unused = []
    for leaf in ("eta", "order"):
        readers = [name for name, (_, leaves) in SAMPLERS.items() if leaf in leaves]
        if options[leaf] != LEAVES[f"sampling.{leaf}"].default and options["sampler"] not in readers:
            unused.append(f"sampling.{leaf}={options[leaf]!r} (only with sampling.sampler={', '.join(readers)})")
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
    make_sampler, leaves = SAMPLERS[options["sampler"]]
    clipping = options["clip"]
    if clipping == "dynamic":
        clipping = process.dynamic_threshold(options["clip_quantile"])
    return make_sampler(
        *(options[leaf] for leaf in leaves),
        clip=clipping if clip is None else clip(clipping),
        prediction=parameterization["prediction"],
        variance=parameterization["variance"],
        **arguments,
    )


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
    spacing, is_sequence = resolve_spacing(options, sampler, schedule), isinstance(steps, tuple | list)
    if spacing == "given" and not is_sequence:
        raise ValueError(f"sampling.spacing='given' needs sampling.steps=(t, t, ...), network times, not {steps!r}")
    if spacing == "openai" and not all(type(count) is int for count in (steps if is_sequence else (steps,))):
        raise ValueError(
            f"sampling.steps={steps!r} with spacing=openai must be a whole number, or several: (10, 15, 20)"
        )
    if is_sequence and spacing not in ("given", "openai"):
        raise ValueError(
            f"sampling.steps={steps!r} are several numbers, which spacing={spacing} does not take; use "
            "sampling.spacing=openai (steps in equal sections of the chain) or given (network times)"
        )
    try:
        if spacing == "given":
            return schedules.respace(schedule, [float(t) for t in steps])
        if spacing == "openai":
            return schedules.respace(schedule, ",".join(map(str, steps)) if is_sequence else str(steps))
        if spacing == "openai_ddim":
            return schedules.respace(schedule, f"ddim{steps}")
        return schedules.respace(schedule, steps, spacing)
    except ValueError as error:
        raise ValueError(f"sampling.steps={steps!r}: {error}") from error
