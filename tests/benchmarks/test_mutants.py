"""`make mutants`: how it draws mutants, stores results and reports them."""

import pytest

from benchmarks import mutant_drawing, mutant_records, mutants

SOURCE = '''
def halve(x: int | None, steps: list[int] = (3,)) -> int | None:
    """Half - not double."""
    y: int | None = x
    return y // 2 | steps[0]
'''


def test_the_table_names_files_and_tests_that_exist():
    for file, tests in mutants.TESTS.items():
        assert (mutants.ROOT / mutants.PACKAGE / f"{file}.py").is_file(), file
        for test in tests:
            path, _, function = test.partition("::")
            source = (mutants.ROOT / "tests" / path).read_text()
            assert not function or f"def {function}(" in source, test
    core = {"losses", "likelihood", "guidance", "timesteps", "labels", "editing", "training/step"}
    for folder in ("schedules", "process", "sampling"):
        core |= {f"{folder}/{path.stem}" for path in (mutants.ROOT / mutants.PACKAGE / folder).glob("[!_]*.py")}
    assert set(mutants.TESTS) == core


def test_only_code_is_mutated():
    pytest.importorskip("cosmic_ray")
    found = mutant_drawing.places(SOURCE)
    lines = SOURCE.splitlines()
    assert {lines[line - 1][column] for line, column in found} == {"3", "/", "2", "|", "0"}
    assert not any(
        "BitOr" in operator for options in found.values() for operator, _ in options if "FloorDiv_" in operator
    )


def test_draws_are_one_line_each_at_different_places_and_repeat(tmp_path):
    pytest.importorskip("cosmic_ray")
    (tmp_path / mutants.PACKAGE).mkdir()
    (tmp_path / mutants.PACKAGE / "halves.py").write_text(SOURCE)
    many, few = (mutant_drawing.draw("halves", count, 3, tmp_path) for count in (40, 2))
    assert few == many[:2] and len(many) == len({mutant.source for mutant in many}) == 5
    assert mutant_drawing.draw("halves", 40, 4, tmp_path) != many
    for mutant in many:
        changed = [line for line in mutant.diff.splitlines()[2:] if line[0] in "+-"]
        assert [line[0] for line in changed] == ["-", "+"] and changed[0][1:] in SOURCE.splitlines()


def rows(file, *outcomes):
    diff = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-    return a * b\n+    return a / b"
    return [{"file": file, "outcome": outcome, "diff": diff} for outcome in outcomes]


def test_the_report_counts_with_the_exact_interval_and_shows_survivors(tmp_path):
    known = [mutant_records.Reason("b", "return a * b", "return a / b", "b is 1.")]
    found = rows("a", *["failed"] * 7, "timeout", "passed", "passed") + rows("b", "failed", "passed")
    text = mutant_records.report(found, {"a": 50, "b": 9}, 0, known)
    # Clopper and Pearson's interval of 8 in 10, from their table; of 1 in 1 it is 0.025 to 1.
    assert "| a | 50 | 10 | 8 | 1 | 0 | 80.0% | 44.4% to 97.5% |" in text
    assert "| b | 9 | 2 | 1 | 0 | 1 | 100.0% | 2.5% to 100.0% |" in text
    assert "| all | 59 | 12 | 9 | 1 | 1 | 81.8% |" in text
    assert text.count("-    return a * b") == 3 and text.count("Equivalent: b is 1.") == 1
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nBefore.\n")
    for again in ("old", text):
        mutant_records.write_report(again, page)
    assert page.read_text().startswith("# Page\n\nBefore.\n") and "old" not in page.read_text()
    assert page.read_text().count(text) == page.read_text().count(mutant_records.BEGIN) == 1


def test_results_are_kept_until_the_file_or_its_tests_change(tmp_path):
    mutant, path = mutant_drawing.Mutant("losses", "x 1", "source", "diff"), tmp_path / "kept.jsonl"
    mutant_records.Results(path).add(mutant, "tests", "passed", "output", 1.0)
    again = mutant_records.Results(path)
    assert again.find(mutant, "tests")["outcome"] == "passed"
    assert again.find(mutant._replace(diff="other"), "tests") is None and again.find(mutant, "others") is None
    assert again.find(mutant, "others", keep_killed=True) is None  # it survived
    again.add(mutant, "tests", "failed", "output", 1.0)
    assert mutant_records.Results(path).find(mutant, "others", keep_killed=True)["outcome"] == "failed"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("body", "outcome"), [("pass", "passed"), ("assert 0", "failed"), ("time.sleep(99)", "timeout")]
)
def test_a_run_ends_as_its_tests_do(tmp_path, body, outcome):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(f"import time\n\n\ndef test_one():\n    {body}\n")
    limit = 3 if outcome == "timeout" else 60
    found, _, seconds = mutants.run_tests(tmp_path, ("test_one.py",), limit, tmp_path / "cache")
    assert found == outcome and seconds < 60


def test_equivalent_mutants_are_of_files_and_lines_that_exist():
    for reason in mutant_records.read_reasons():
        assert reason.file in mutants.TESTS and reason.why.endswith(".")
        source = (mutants.ROOT / mutants.PACKAGE / f"{reason.file}.py").read_text()
        assert all(line in source for line in reason.removed.splitlines()), reason
