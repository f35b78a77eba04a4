"""`make accelerator`: its checks on a CPU and in two processes, and the exit code."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import first_contact
from helpers.program import finish, free_port, start

PROGRAM = "benchmarks/first_contact.py"


def words(out):
    """{check: ok, skipped or FAILED} of the printed lines."""
    lines = [line.split() for line in out.splitlines() if line.startswith(("ok ", "skipped ", "FAILED "))]
    return {name: word for word, name, *_ in lines}


@pytest.mark.slow
def test_the_checks_pass_on_a_cpu():
    code, out, err = finish(start(program=PROGRAM))
    skipped = dict.fromkeys(("fsdp", "steps_per_call"), "skipped")
    assert words(out) == dict.fromkeys(first_contact.CHECKS, "ok") | skipped, out + err
    assert code == 0 and "on 1 x cpu, 1 process(es)" in out


@pytest.mark.slow
def test_the_checks_pass_in_two_processes(tmp_path):
    flags = [f"--directory={tmp_path}", f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    flags.append("--checks=resume,fsdp")
    pair = [start(*flags, f"--process_id={i}", program=PROGRAM) for i in range(2)]
    (code, out, err), (other_code, other_out, _) = [finish(process) for process in pair]
    assert words(out) == {"resume": "ok", "fsdp": "ok"}, out + err
    assert (code, other_code) == (0, 0) and "on 2 x cpu, 2 process(es)" in out and "ok" not in other_out


def test_a_failed_check_sets_the_exit_code_and_the_others_go_on(monkeypatch, capsys):
    def fail():
        raise KeyError("broken")

    named = dict.fromkeys(first_contact.CHECKS, lambda: "fine") | {"resume": fail}
    monkeypatch.setattr(first_contact, "Checks", lambda directory: types.SimpleNamespace(**named))
    assert first_contact.main([]) == 1
    assert words(capsys.readouterr().out) == dict.fromkeys(first_contact.CHECKS, "ok") | {"resume": "FAILED"}


def test_a_measured_step_stands_beside_the_estimate_of_a_tpu():
    text = (pathlib.Path(__file__).parents[1] / "fixtures/tpu_program.txt").read_text()
    assert first_contact.beside_estimate(text, 1323e-9).endswith("1,323 cycles, which take this time at 1 GHz")
    here = jax.jit(jnp.tanh).lower(jnp.ones(3)).compile().as_text()
    assert first_contact.beside_estimate(here, 1.0) == ""
