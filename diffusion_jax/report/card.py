"""Texts of a report: what was trained on which data, the newest result with a verdict, and warnings for comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax import config as configs
from diffusion_jax import data
from diffusion_jax.console import format_duration, format_time
from diffusion_jax.evaluation.compare import remarks
from diffusion_jax.metrics import MEANINGS, find_meaning, format_value, reported_values
from diffusion_jax.report.collect import RunFiles

_SHOWN_STATES = ("state", "time left", "speed", "checkpoint", "loss", "goodput")
# Measurements are compared if these entries agree.
_PROTOCOL = ("dataset", "reference", "num_reference", "num_samples", "features", "features_digest", "resize")
_UNBIASED = ("kid", "kernel_distance", "energy_distance")  # 0 on average for equal distributions
_COPIES = 0.1  # share of near copies; 0.01 is expected for new examples


def facts(run: RunFiles) -> dict[str, str]:
    """Returns {name: text} with a run's data, objective, network, steps, duration and state; {} without a config."""
    config, launches = run.config, run.launches
    if config is None:
        return {}
    diffusion, model, images = config.diffusion, config.model, run.data.get("images")
    count = "" if images is None else f"{images:,} "
    size = " x ".join(map(str, data.example_shape(config.data)))
    noise = (
        f"path {diffusion.path}"
        if diffusion.path
        else f"{diffusion.schedule} schedule, T = {diffusion.num_timesteps:,}"
    )
    widths = f", {model.channels} channels x {model.channel_multipliers}" if model.kind == "unet" else ""
    rows = {
        "data": f"{count}{data.noun(config.data)} of {config.data.dataset} ({config.data.split}), size {size}",
        "objective": f"prediction {diffusion.prediction}, loss {diffusion.loss}, {noise}",
        "network": f"{model.kind}{widths}",
        "steps": f"{run.status.get('progress', 'none')}, batch {config.training.batch_size}",
    }
    if launches:
        seconds = sum(launch["end"] - launch["start"] for launch in launches)
        where = "{devices} x {device_kind}".format(**launches[-1]["environment"])
        if parameters := launches[-1].get("parameters"):
            rows["network"] += f", {parameters:,} parameters"
        rows["duration"] = f"{format_duration(seconds)} on {where}, launches: {len(launches)}"
        rows["trained"] = f"{format_time(launches[0]['start'])} to {format_time(launches[-1]['end'])}"
    if run.calibrations:
        failed = sum(not str(each.get("sentence")).startswith("no error found") for each in run.calibrations)
        rows["calibration"] = f"{len(run.calibrations)} tested, errors found in {failed}"
    return rows | {name: run.status[name] for name in _SHOWN_STATES if name in run.status}


def newest_result(records: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Describes the newest record with a metric, by its first metric in the order of `MEANINGS`; or a classifier's accuracy.

    lines: the lines of the log. Without a metric, the dictionary has only the verdict.
    """
    order = [meaning.text for meaning in MEANINGS.values()]
    for i, record in reversed(list(enumerate(records))):
        values = reported_values(record)
        meanings = {key: meaning for key in values if (meaning := find_meaning(key)) and meaning.better}
        if meanings:
            key = min(meanings, key=lambda key: order.index(meanings[key].text))
            texts = {name: format_value(values[name], record.get(f"{name}_standard_error")) for name in meanings}
            others = ", ".join(f"{meanings[name].name} {text}" for name, text in texts.items() if name != key)
            error = record.get(f"{key}_standard_error")
            return {
                "name": f"{meanings[key].name}: {'; '.join([*remarks(key, record), *['no standard error'] * (not error)])}",
                "value": texts[key],
                "source": f"Measured at {_source(record)}, against {record.get('reference')}.",
                "verdict": _judge(key, meanings[key].better, record, records[:i]),
                "others": others,
            }
    if measured := [line for line in lines if "accuracy" in line]:
        return {
            "name": "accuracy on noisy training examples: higher is better; no standard error",
            "value": f"{measured[-1]['accuracy']:.3g}",
            "source": f"Logged at step {measured[-1]['step']:,}.",
            "verdict": "A classifier guides the sampling of another model: sampling.classifier.",
        }
    return {"verdict": "No metric is measured yet: run --mode=evaluate."}


def _source(record: Mapping[str, Any]) -> str:
    sampler, weights = record.get("sampling", {}).get("sampler"), str(record.get("weights")).replace("ema", "EMA")
    by = f", {sampler} with {record.get('steps')} steps" if sampler else ""
    return f"step {record.get('step')}, {weights} weights{by}"


def _judge(key: str, better: str, record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str:
    """Compares a result with equal distributions, the paper, and the previous measurement with the same protocol."""
    value, error, found = reported_values(record)[key], record.get(f"{key}_standard_error") or 0.0, []
    if key in _UNBIASED and error:
        z = value / error
        found.append(f"{z:.1f} standard errors above equal distributions." if z > 2 else "No difference found.")
    if reported := record.get("reported"):
        found.append(f"The paper reports an FID of {reported['fid']:g}.")
    before = [old for old in earlier if key in reported_values(old) and protocol(old) == protocol(record)]
    for old in before[-1:]:
        old_value, old_error = reported_values(old)[key], old.get(f"{key}_standard_error") or 0.0
        gain = {"lower": old_value - value, "higher": value - old_value}.get(better, abs(old_value) - abs(value))
        change = "Similar to" if abs(gain) <= error + old_error else "Better than" if gain > 0 else "Worse than"
        found.append(f"{change} {format_value(old_value, old_error or None)} before, at {_source(old)}.")
    share = reported_values(record).get("close_share", 0)
    found += [f"{share:.0%} of the samples are near copies of training examples."] * (share > _COPIES)
    found += [f"Caution: {note}." for name, note in record.get("notes", {}).items() if name == key]
    return " ".join(found or ["No other measurement with these settings to compare with yet."])


def protocol(record: Mapping[str, Any]) -> str:
    """Returns the settings that two measurements must share to be compared."""
    return json.dumps([record.get(name) for name in _PROTOCOL])


def find_differences(runs: Mapping[str, RunFiles]) -> list[str]:
    """Returns a warning for each difference between runs: in the data, the objectives, or the noise of the samples."""
    known, warnings = [configs.flatten(run.config) for run in runs.values() if run.config is not None], []
    for what, prefix, effect in (
        ("data", "data.", "losses and metrics cannot be compared"),
        ("objectives", "diffusion.", "losses cannot be compared; metrics of samples can"),
        ("noise of the samples", "sampling.seed", "the pictures differ in more than the networks"),
    ):
        keys = dict.fromkeys(key for each in known for key in each if key.startswith(prefix))
        keys = [key for key in keys if configs.is_identity(key) or key == prefix]
        differing = [key for key in keys if len({str(each.get(key)) for each in known}) > 1]
        if prefix == "data." and len({str(run.data.get("sha256_of_some")) for run in runs.values()}) > 1:
            differing.append("data.json")
        warnings += [f"The {what} differ ({', '.join(differing)}): {effect}."] * bool(differing)
    return warnings
