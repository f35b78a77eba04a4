"""Every picture of the documents has a command, and a change to the picture's sources makes the picture stale."""

import importlib.util
import re
import shlex

import pytest

from diffusion_jax import cli
from helpers.pages import parse_subcommand
from helpers.paths import ROOT


def load_script():
    spec = importlib.util.spec_from_file_location("check_pictures", ROOT / "docs" / "check_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_pictures = load_script()


def test_every_picture_has_one_drawing_and_a_record():
    drawn = [image for drawing in check_pictures.DRAWINGS for image in drawing.images]
    files = {path.name for path in (ROOT / "docs" / "images").iterdir()} - {"drawn.json"}
    assert sorted(drawn) == sorted(files)
    assert check_pictures.read_records().keys() == files


@pytest.mark.parametrize("drawing", check_pictures.DRAWINGS, ids=lambda drawing: drawing.images[0])
def test_commands_parse_and_sources_exist(drawing, tmp_path):
    for pattern in drawing.sources:
        assert check_pictures.digests((pattern,)), pattern
    for command in filter(None, drawing.command.split(" && ")):
        words = shlex.split(command)
        if words[:2] == ["python", "main.py"] and words[2] in cli.COMMANDS:
            parse_subcommand(words[2:])
        elif words[:2] == ["python", "main.py"]:
            config = [] if any(word.startswith("--config=") for word in words) else ["--config=digits"]
            arguments = [f"--workdir={tmp_path}" if word.startswith("--workdir=") else word for word in words[2:]]
            parsed = cli.parse(arguments + config)
            cli.check_mode(parsed.mode, parsed.config)
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text()
            for word in words[2:]:
                assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in script, command
        else:
            assert words[0] == "cp" and words[-1] in [f"docs/images/{image}" for image in drawing.images]
    is_by_hand = drawing.images == ("architecture.svg",)
    assert bool(drawing.command) != is_by_hand


def test_changed_code_makes_a_picture_stale_but_comments_do_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_pictures, "ROOT", tmp_path)
    monkeypatch.setattr(check_pictures, "IMAGES", tmp_path)
    monkeypatch.setattr(check_pictures, "RECORDS", tmp_path / "drawn.json")
    drawing = check_pictures.Drawing(("a.png",), "cp draw.py a.png", ("draw.py", "n*.txt"))
    monkeypatch.setattr(check_pictures, "DRAWINGS", (drawing,))
    script, picture = tmp_path / "draw.py", tmp_path / "a.png"
    script.write_text('"""Draws."""\nx = 1\n')

    def stale():
        return check_pictures.changes(drawing, "a.png", check_pictures.read_records().get("a.png"))

    picture.write_text("by hand")
    assert stale() == ["the picture, without a record"]
    check_pictures.draw(drawing)
    assert stale() == [] and picture.read_text() == script.read_text()
    script.write_text('"""Draws a\n\npicture."""\n# one\n\nx = 1\n')
    assert stale() == []
    script.write_text('"""Draws."""\nx = 2\n')
    assert stale() == ["draw.py"]
    (tmp_path / "new.txt").write_text("")
    assert stale() == ["draw.py", "new.txt"]
    monkeypatch.setattr("sys.argv", ["check_pictures.py"])
    with pytest.raises(SystemExit, match="1"):
        check_pictures.main()
    assert "cp draw.py a.png" in capsys.readouterr().out
    check_pictures.draw(drawing)
    check_pictures.main()
    picture.write_text("by hand")
    assert stale() == ["the picture, without a record"]


def test_a_new_version_makes_a_picture_stale_that_shows_the_version(monkeypatch):
    """The page of a report has the version, so its picture has it, too."""
    assert "by diffusion_jax $version" in (ROOT / "diffusion_jax" / "report" / "static" / "page.html").read_text()
    drawing = check_pictures.drawing_of("report.png")
    record = check_pictures.read_records()["report.png"] | {"sources": check_pictures.digests(drawing.sources)}
    record["version"] = "1.0.0"
    monkeypatch.setattr(check_pictures.diffusion_jax, "__version__", "1.0.0")
    assert check_pictures.changes(drawing, "report.png", record) == []
    monkeypatch.setattr(check_pictures.diffusion_jax, "__version__", "1.0.1")
    assert check_pictures.changes(drawing, "report.png", record) == ["the version, now 1.0.1"]


def test_the_diagram_has_the_stages_of_the_architecture_page():
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text()
    diagram = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    described = re.findall(r"^(\d)\. `([\w/.]+):", page, re.MULTILINE)
    shown = re.findall(r">(\d)</text>\s*<text[^>]*>([\w/.]+)<", diagram)
    assert len(shown) == 14
    assert all(one[0] == other[0] and one[1].endswith(other[1]) for one, other in zip(described, shown, strict=True))
