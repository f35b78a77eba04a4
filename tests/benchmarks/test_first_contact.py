"""`make accelerator`: its checks on a CPU and in two processes, what each check refuses, and the exit code."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import first_contact
from diffusion_jax.training import build
from helpers.program import finish, free_port, start

PROGRAM = "benchmarks/first_contact.py"


def words(out):
    """{check: ok, skipped or FAILED} of the printed lines."""
    lines = [line.split() for line in out.splitlines() if line.startswith(("ok ", "skipped ", "FAILED "))]
    return {name: word for word, name, *_ in lines}


@pytest.mark.whole
def test_the_checks_pass_on_a_cpu():
    code, out, err = finish(start(program=PROGRAM))
    skipped = dict.fromkeys(("fsdp", "steps_per_call"), "skipped")
    assert words(out) == dict.fromkeys(first_contact.CHECKS, "ok") | skipped, out + err
    assert code == 0 and "on 1 x cpu, 1 process(es)" in out


@pytest.mark.whole
def test_the_checks_pass_in_two_processes(tmp_path):
    flags = [f"--directory={tmp_path}", f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    flags.append("--checks=resume,fsdp")
    pair = [start(*flags, f"--process_id={i}", program=PROGRAM) for i in range(2)]
    (code, out, err), (other_code, other_out, _) = [finish(process) for process in pair]
    assert words(out) == {"resume": "ok", "fsdp": "ok"}, out + err
    assert (code, other_code) == (0, 0) and "on 2 x cpu, 2 process(es)" in out and "ok" not in other_out


class OnTpu:
    """jax as `training.build` sees it on a TPU."""

    default_backend = staticmethod(lambda: "tpu")

    def __getattr__(self, name):
        return getattr(jax, name)


@pytest.mark.whole
def test_steps_of_one_program_are_single_steps(tmp_path, monkeypatch):
    checks = first_contact.Checks(tmp_path)
    assert checks._trained[0].shape == (first_contact.STEPS, 2)
    monkeypatch.setattr(build, "jax", OnTpu())
    assert checks.steps_per_call().startswith("losses and gradient norms to ")


ROWS = np.array([[1.0, 5.0], [0.9, 4.0], [0.8, 3.0], [0.7, 2.0]])


def replace_training(monkeypatch, changed=None):
    """Makes `train` return rows and a state; `changed` changes those of every call but the first."""
    calls = []

    def train(config, directory=None):
        calls.append(config)
        rows, state = ROWS.copy(), {"kernel": jnp.arange(4.0), "step": jnp.int32(4)}
        return (rows, state) if len(calls) == 1 or changed is None else changed(rows, state)

    monkeypatch.setattr(first_contact, "train", train)


def test_a_resumed_run_must_be_equal_to_the_bit(tmp_path, monkeypatch):
    ulp = np.finfo(np.float32).eps

    def change_state(rows, state):
        return rows, state | {"kernel": state["kernel"].at[1].add(ulp)}

    def change_losses(rows, state):
        rows[-1, 0] *= 1 + np.finfo(np.float64).eps
        return rows, state

    for changed, passes in ((None, True), (change_state, False), (change_losses, False)):
        replace_training(monkeypatch, changed)
        checks = first_contact.Checks(tmp_path)
        _ = checks._trained
        if passes:
            assert checks.resume() == "bit-identical after a checkpoint"
        else:
            with pytest.raises(first_contact.CheckFailed, match="not bit-identical"):
                checks.resume()


def test_split_parameters_must_agree_with_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    for factor, column, passes in ((1 + 5e-5, 0, True), (1 + 5e-4, 0, False), (1 + 5e-4, 1, False)):

        def change(rows, state, factor=factor, column=column):
            rows[0, column] *= factor
            return rows, state

        replace_training(monkeypatch, change)
        checks = first_contact.Checks(tmp_path)
        _ = checks._trained
        if passes:
            assert checks.fsdp() == "losses and gradient norms to 5.0e-05"
        else:
            with pytest.raises(first_contact.CheckFailed, match="losses and gradient norms differ by 5.0e-04"):
                checks.fsdp()


def test_outputs_and_bfloat16_must_agree_with_the_cpu(tmp_path, monkeypatch):
    replace_training(monkeypatch)
    checks = first_contact.Checks(tmp_path)
    reference = np.array([1.0, -4.0])
    outputs = {"highest": 1e-5, "default": 1e-2, "bfloat16": 0.05}
    cpu = jax.local_devices(backend="cpu")[-1]
    monkeypatch.setattr(checks, "_outputs_of_the_cpu", reference)
    assert cpu.platform == "cpu"

    def outputs_of(device, precision="highest", dtype=None):
        return reference + 4 * outputs[dtype or precision]

    monkeypatch.setattr(checks, "_outputs", outputs_of)
    assert checks.outputs() == "outputs to 1.0e-05; at the default precision to 1.0e-02"
    assert checks.bfloat16() == "outputs to 5.0e-02; losses and gradient norms to 0.0e+00"
    for name, check in (("highest", checks.outputs), ("default", checks.outputs), ("bfloat16", checks.bfloat16)):
        monkeypatch.setitem(outputs, name, 0.2)
        with pytest.raises(first_contact.CheckFailed, match=r"differ by 2\.0e-01 of the largest value"):
            check()
        monkeypatch.setitem(outputs, name, float("nan"))
        with pytest.raises(first_contact.CheckFailed):
            check()
        monkeypatch.setitem(outputs, name, 1e-6)


def test_the_checks_end_after_the_time_limit(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(first_contact, "MAX_SECONDS", 0.01)
    monkeypatch.setattr(first_contact, "exit_now", lambda message, code: ended.set() if code == 1 else None)
    waits = types.SimpleNamespace(step=lambda: "ended" if ended.wait(60) else "not ended")
    monkeypatch.setattr(first_contact, "Checks", lambda directory: waits)
    assert first_contact.main(["--checks=step"]) == 0 and ended.is_set()


@pytest.mark.parametrize("failure", [None, first_contact.CheckFailed("not equal"), KeyError("broken\nlong")])
def test_a_failed_check_sets_the_exit_code_and_the_others_go_on(monkeypatch, capsys, failure):
    def fail():
        if failure:
            raise failure
        return "fine"

    def skip():
        raise first_contact.Skipped("one device")

    named = dict.fromkeys(first_contact.CHECKS, lambda: "fine") | {"resume": fail, "fsdp": skip}
    monkeypatch.setattr(first_contact, "Checks", lambda directory: types.SimpleNamespace(**named))
    assert first_contact.main([]) == (1 if failure else 0)
    out = capsys.readouterr().out
    expected = (
        dict.fromkeys(first_contact.CHECKS, "ok") | {"fsdp": "skipped"} | ({"resume": "FAILED"} if failure else {})
    )
    assert words(out) == expected and len(out.splitlines()) == 2 + len(first_contact.CHECKS)
    with pytest.raises(SystemExit):
        first_contact.main(["--checks=resume,outputz"])
    assert out.splitlines()[-1] == ("at least one check failed" if failure else "all checks passed")
