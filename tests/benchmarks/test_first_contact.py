"""`make accelerator`: its checks on a CPU."""

import pytest

from benchmarks import first_contact
from helpers.program import finish, start

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
