"""`make mutants`: how the command draws mutants, selects and runs the tests, and reports the result."""

import subprocess

import pytest

from benchmarks import mutant_drawing, mutants

SOURCE = '''
def halve(x: int | None, steps: list[int] = (3,)) -> int | None:
    """Half - not double."""
    y: int | None = x
    return y // 2 | steps[0]
'''


def test_draws_are_one_line_each_at_different_places_and_stay_when_other_lines_change(tmp_path):
    pytest.importorskip("cosmic_ray")
    (tmp_path / mutants.PACKAGE).mkdir()
    path = tmp_path / mutants.PACKAGE / "halves.py"

    def draw(source, count, seed):
        path.write_text(source)
        return mutant_drawing.draw(["halves.py"], count, seed, tmp_path)

    (many, num_places), (few, _) = (draw(SOURCE, count, 3) for count in (40, 2))
    assert few == many[:2] and len(many) == len({mutant.source for mutant in many}) == num_places == 5
    assert draw(SOURCE, 40, 4)[0] != many
    for mutant in many:
        changed = [line for line in mutant.diff.splitlines()[2:] if line[0] in "+-"]
        assert [line[0] for line in changed] == ["-", "+"] and changed[0][1:] in SOURCE.splitlines()
    longer, _ = draw(f"z = 1 + 2\n{SOURCE}", 40, 3)
    kept = [mutant.source.partition("\n")[2] for mutant in longer if mutant.source.startswith("z = 1 + 2\n")]
    assert kept == [mutant.source for mutant in many]


def test_lines_that_were_added_since_a_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / mutants.PACKAGE / "lines.py"
    path.parent.mkdir()
    path.write_text("a\nb\nc\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert mutant_drawing.added_lines(tmp_path, "HEAD", "lines.py") == set()
    path.write_text("new\na\nB\nc\nd\ne\n")
    assert mutant_drawing.added_lines(tmp_path, "HEAD", "lines.py") == {1, 3, 5, 6}


def test_every_file_has_tests_and_equivalent_mutants_are_recorded_by_their_lines():
    assert all(mutants.package_files(mutants.ROOT))
    diff = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-    return a * b\n+    return a / b"
    reasons = {("x.py", "return a * b", "return a / b"): "b is 1."}
    mutant = mutant_drawing.Mutant("x.py", "", "", diff)
    assert mutants.equivalence_reason(mutant, reasons) == "b is 1."
    assert mutants.equivalence_reason(mutant._replace(file="y.py"), reasons) is None
    for file, removed, _ in mutants.read_reasons():
        assert all(line in (mutants.ROOT / mutants.PACKAGE / file).read_text() for line in removed.splitlines()), file
