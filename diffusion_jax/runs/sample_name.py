"""The part of a file name that distinguishes samples with different options."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_jax.runs.chunk_store import options_digest
from diffusion_jax.runs.class_labels import ClassLabels

__all__ = ["sample_name"]

# Leaves of `config.sampling` that are paths: a digest of them is in the name, not their text.
_PATHS = ("classifier", "low_resolution", "conditions")


def sample_name(options: Mapping, num_steps: int, spacing: str, labels: ClassLabels, clips_by_default: bool) -> str:
    """The options of `config.sampling` that differ from the defaults, and a digest of those that no name can hold.

    options: with a resolved clip. num_steps: those of the sampler. spacing: the resolved one.
    """
    parts = [f"{options['sampler']}{num_steps}", *_steps_in_name(options, spacing), *_sampler_options(options)]
    if options["clip"] == "dynamic":
        parts.append(f"clip-dynamic{_number(options['clip_quantile'])}")
    elif options["clip"] != clips_by_default:
        parts.append("clip" if options["clip"] else "clip-none")
    hashed = {leaf: options[leaf] for leaf in _PATHS if options[leaf]}
    if labels.given is not None:
        hashed["labels"] = labels.given.tolist()
    if spacing == "given":
        hashed["steps"] = options["steps"]
    if options["label"] is not None:
        name, needs_digest = labels.name_in_files()
        if needs_digest:
            hashed["classes"] = labels.classes
        parts.append(name)
    if options["guidance_scale"] != 1:
        parts.append(f"guided{_number(options['guidance_scale'])}")
        interval = options["guidance_interval"]
        if interval:
            parts.append("interval" + "-".join(map(_number, interval)))
        if options["guidance_rescale"]:
            parts.append(f"rescale{_number(options['guidance_rescale'])}")
    if options["classifier"]:
        form = "-mean" if options["classifier_form"] == "mean" else ""
        parts.append(f"classifier{_number(options['classifier_scale'])}{form}")
    if options["low_resolution_noise"]:
        parts.append(f"noise{_number(options['low_resolution_noise'])}")
    return "_".join(parts + ([options_digest(hashed)[:6]] if hashed else []))


def _number(value: float) -> str:
    """A number as short as it can be written exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _steps_in_name(options: Mapping, spacing: str) -> list[str]:
    steps = options["steps"]
    if steps is None or spacing == "trailing":
        return []
    sections = steps if spacing == "openai" and isinstance(steps, tuple | list) else ()
    return [spacing + "-".join(map(str, sections))]


def _sampler_options(options: Mapping) -> list[str]:
    """The options of the sampler that differ from the defaults."""
    sampler, parts = options["sampler"], []
    if sampler in ("dpm_solver_pp", "unipc", "deis"):
        parts += [f"order{options['order']}"] * (options["order"] != 2)
        parts += ["fullorder"] * (not options["lower_order_final"])
    if sampler == "unipc" and options["variant"] != "bh2":
        parts.append(options["variant"])
    if sampler == "dpm_solver_pp":
        parts += ["singlestep"] * options["singlestep"] + ["sde"] * options["sde"]
    if sampler == "ddim" and options["eta"]:
        parts.append(f"eta{_number(options['eta'])}")
    if sampler == "heun" and options["churn"]:
        interval = options["churn_range"]
        parts.append(f"churn{_number(options['churn'])}")
        parts += ["range" + "-".join(map(_number, interval))] if interval else []
        parts += [f"noise{_number(options['churn_noise'])}"] * (options["churn_noise"] != 1)
    return parts
