"""Terminal output: durations and bars."""

import ast
import dataclasses
import json
import os
import re
import sys
import threading
import types
import unicodedata
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import Denoiser, cli, console, models, sampling, schedules
from diffusion_jax import pretrained as weights
from diffusion_jax.distributed import processes
from diffusion_jax.errors import UserError, shorten_middle, visible, wrap
from diffusion_jax.evaluation import __main__ as evaluation
from diffusion_jax.evaluation import compare
from diffusion_jax.metrics import MEANINGS
from diffusion_jax.pretrained import __main__ as pretrained
from diffusion_jax.pretrained import format_summary
from diffusion_jax.report import __main__ as report
from diffusion_jax.runs import status
from diffusion_jax.training.state import initial_params
from helpers.simulated_runs import write_run


@pytest.mark.parametrize(
    ("seconds", "text"), [(62, "1:02"), (3 * 3600 + 245, "3:04:05"), (2726 * 3600, "114 days"), (47 * 3600, "47:00:00")]
)
def test_durations(seconds, text):
    assert console.format_duration(seconds) == text


def test_bars_count_images(capsys):
    """A bar for 300 images in two chunks does not show "2/2"."""
    assert list(console.progress_over("Reading the images")([256, 44], 300)) == [256, 44]
    assert capsys.readouterr().out.startswith("Reading the images 300/300 (100%)")


# ---- Names that control a terminal


HOSTILE = (
    "a\x1b]0;title\x07\x9b31m\u202eb\x7f\nerror: c\r\u2028\udc9b"  # a title, a color, a line in reverse, a second line
)
BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
SHOWN = r"a\x1b]0;title\x07\x9b31m\u202eb\x7f\nerror: c\r\u2028\udc9b"


def is_harmless(text, lines=1):
    assert text.count("\n") == lines, text
    return not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_every_control_character_is_visible():
    every = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.bidirectional(chr(i)) in BIDIRECTIONAL]
    every += [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) in ("Cc", "Cs", "Zl", "Zp")]
    assert visible("".join(every)).isprintable() and len(every) > 2000
    assert visible(HOSTILE) == SHOWN and visible("ä 猫 🐈\tb", "\t") == "ä 猫 🐈\tb"
    assert ast.literal_eval(f"'{visible(HOSTILE)}'") == HOSTILE


def test_names_do_not_control_the_terminal(tmp_path, capsys, monkeypatch, narrow):
    """Lines, errors, warnings, tracebacks, bars, status and the description of weights."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # `program` replaces it
    processes.log(HOSTILE)
    assert is_harmless(capsys.readouterr().out)
    for error in (UserError(HOSTILE), OSError(2, HOSTILE, HOSTILE), RuntimeError(HOSTILE)):
        with pytest.raises(SystemExit), cli.program([]):
            warnings.warn(HOSTILE, stacklevel=1)
            raise error
        assert is_harmless(capsys.readouterr().err, lines=2)
        sys.excepthook(type(error), error, error.__traceback__)
        shown = capsys.readouterr().err
        assert r"\x1b]0;title" in shown and is_harmless(shown, shown.count("\n"))
    assert is_harmless(str(UserError(HOSTILE)))  # also where Python prints the traceback
    written = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data.decode()))
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(processes, "_LAST_LINE", threading.Lock())
    processes.exit_now(HOSTILE, 2)
    assert is_harmless("".join(written))
    write_run(tmp_path)
    goodput = json.loads((tmp_path / "goodput.json").read_text())
    goodput[-1]["stopped_by"] = HOSTILE
    (tmp_path / "goodput.json").write_text(json.dumps(goodput))
    shown = status.report(cli.parse([f"--workdir={tmp_path}", "--mode=status"]).config, tmp_path)
    assert r"\x1b]0;title" in shown and is_harmless(shown, shown.count("\n"))
    summary = format_summary(weights.from_config({"data": {"dataset": "digits"}}))
    hostile = format_summary(dataclasses.replace(weights.from_config({}), family=HOSTILE))
    assert is_harmless(hostile, summary.count("\n"))
    with console.ProgressBar(HOSTILE, 2) as bar:
        bar.update(2, HOSTILE)
    assert is_harmless(capsys.readouterr().out)
    narrow()
    with console.ProgressBar(f"[link=http://x]{HOSTILE}", 2) as bar:
        bar.update(2, f"[/x]{HOSTILE}")
    shown = capsys.readouterr().out
    assert r"[/x]a\x1b]0;" in shown and "\x1b[" in shown and not {*"\x07\x9b\u202e\x7f"} & {*shown}


# ---- 80 columns


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 80 columns; a function that makes the standard output of a test a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return lambda: monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def is_narrow(text):
    assert text.strip()
    return max(map(len, text.splitlines())) <= 80


def test_lines_are_wrapped_below_their_text():
    assert wrap("name  some words", 12) == "name  some\n      words"
    assert wrap("  two words\n\nlast", 8) == "  two\n  words\n\nlast"
    assert wrap("/a/long/path/of/a/file", 8) == "/a/long/path/of/a/file"  # can be copied


def test_the_middle_of_a_long_name_is_left_out():
    assert shorten_middle("step300_ema_ddpm250_seed0_n100.npz", 20) == "step300...0_n100.npz"
    assert shorten_middle("short", 5) == "short"


@pytest.mark.parametrize("program", [cli, evaluation, pretrained, report], ids=lambda module: module.__name__)
def test_help_fits_a_terminal(program, narrow):
    assert is_narrow(program.make_parser().format_help())


def test_the_paragraphs_of_help_keep_indented_lines(narrow):
    text = cli.make_parser().format_help()
    assert "\n  sample            draw samples\n" in text and "\nRerun the same command" in text


def test_status_metrics_and_lines_fit_a_terminal(narrow, tmp_path, capsys):
    narrow()
    write_run(tmp_path)
    config = status.open_run_dir(tmp_path)
    report = status.report(cli.parse([f"--workdir={tmp_path}", "--mode=status"]).config, config)
    assert is_narrow(report.replace(str(tmp_path), "DIR"))  # a long name is not broken
    record = {name: 0.123456 for name in MEANINGS} | {f"{name}_standard_error": 0.0123 for name in MEANINGS}
    compare.log_values(record | {"memorization": {"close_share": 0.0}, "kid_same_distribution": 0.1})
    processes.log("words and " * 30)
    assert is_narrow(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("title", "note"),
    [
        ("Features of step300_ema_dpm_solver_pp25_trailing_guided2.0_seed0_n100.npz", ""),
        ("Training", "loss 0.1234  1,234 images/s  70.5 GB"),
    ],
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_fit_a_terminal(title, note, is_terminal, narrow, capsys):
    if is_terminal:
        narrow()
    with console.ProgressBar(title, 800_000) as bar:
        bar.update(400_000, note)
        bar.update(800_000, note)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).replace("\r", "\n")
    assert title[:8] in shown and "800000/800000" in shown and note in shown and is_narrow(shown)


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_a_bar_moves_within_a_batch_at_a_terminal_and_changes_no_sample(name, narrow):
    """Elsewhere the denoiser is the same, so its program has no calls of the host."""
    schedule = schedules.respace(schedules.from_betas(schedules.betas("cosine", 100)), 4, "trailing")
    sampler, x_T = sampling.SAMPLERS[name](), jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    denoiser = Denoiser(lambda x_t, time: jnp.tanh(x_t) * time[:, None, None, None] / 100)
    num_calls = sampler.num_calls(schedule.num_timesteps)
    assert console.CallCounter(num_calls).wrap(denoiser) is denoiser
    narrow()
    counter, shares, starts = console.CallCounter(num_calls), [], []
    bar: Any = types.SimpleNamespace(update=shares.append, start_clock=starts.append)
    draw: Any = jax.jit(lambda denoiser: sampling.sample(jax.random.key(1), schedule, denoiser, x_T, sampler))
    for done in (0, 2):
        counter.begin(bar, done, 2)
        samples = jax.block_until_ready(draw(counter.wrap(denoiser)))
        jax.effects_barrier()
        # With few optimizations, the two programs round differently.
        rounding = 1e-6 * jax.config.read("jax_disable_most_optimizations")
        np.testing.assert_allclose(samples, draw(denoiser), rtol=0, atol=rounding)
    assert shares == [done + 2 * i / num_calls for done in (0, 2) for i in range(1, num_calls + 1)]
    assert starts == [2 / num_calls]  # so that the remaining time leaves out the compilation
    assert draw._cache_size() == 2  # with and without the counter


@pytest.mark.thorough
def test_layers_are_listed_in_the_order_of_execution(capsys):
    network = models.UNet(channels=8, channel_multipliers=(1, 2), num_groups=4, num_res_blocks=1, out_channels=1)
    console.log_parameters(lambda key: initial_params(key, network, (8, 8, 1)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = [row[0] for row in rows]
    assert names[:5] == ["time_0", "time_1", "conv_in", "down_0", "down_1"]
    assert names.index("up_1") < names.index("up_0") < names.index("conv_out")
    params = initial_params(jax.random.key(0), network, (8, 8, 1))
    assert sum(int(row[1].replace(",", "")) for row in rows) == sum(x.size for x in jax.tree.leaves(params))
