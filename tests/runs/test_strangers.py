"""A run of a stranger executes nothing, writes nowhere else, and changes no number without a word."""

import contextlib
import importlib.util
import json
import os
import pathlib
import py_compile
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import cli, data, pretrained
from diffusion_jax.config import SETTINGS
from diffusion_jax.errors import CheckpointError, LeaseLostError, StorageError, UserError
from diffusion_jax.functions import import_function
from diffusion_jax.report import write_report
from diffusion_jax.run_dir import open_run_dir
from diffusion_jax.runs import sample, train, workdir
from diffusion_jax.runs.logging import PARTS
from diffusion_jax.storage import downloads
from diffusion_jax.training.checkpoints import Checkpoints, digest
from helpers.array_configs import array_config, write_arrays
from helpers.paths import ROOT
from helpers.work_directories import last_state, untrained

IMPORTING = sorted(name for name, setting in SETTINGS.items() if setting.imports)
PATHS = sorted(name for name, setting in SETTINGS.items() if setting.is_path)
EVIL = (
    "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n\n\ndef make(*arguments):\n    return None\n"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vectors")
    config = array_config("vectors", write_arrays("vectors", directory / "data.npz"))
    return untrained(directory / "run", config, data.load(config.data))


@pytest.fixture
def run(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the working directory that leaves a file when it is imported."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("evil", None)


def edit(path, changes):
    """Changes values of a JSON file by their dotted names."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *groups, last = name.split(".")
        place = content
        for group in groups:
            place = place[group]
        place[last] = value
    path.write_text(json.dumps(content))


def change_digests(run, change):
    """Applies a function to the table in the checkpoint's digests.json."""
    path = run / "checkpoints" / "1" / "digests.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def store_copy(run):
    """Stores config.json in the checkpoint, with its digest, like a stranger who rewrites both."""
    copy = shutil.copy(run / "config.json", run / "checkpoints" / "1" / "config.json")
    change_digests(run, lambda table: table.update({"config.json": digest(copy)}))


def call(*arguments):
    """Calls the program in this process. Returns: the exit code."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


# ---- Code


def test_the_settings_that_import():
    groups = {
        "diffusion": "draw loss path schedule timestep_sampler weighting",
        "editing": "operator",
        "evaluation": "features metrics quantities",
        "optimizer": "frozen name",
        **{"data": "dataset", "logging": "writers", "model": "kind", "sampling": "sampler"},
    }
    assert sorted(f"{group}.{name}" for group, names in groups.items() for name in names.split()) == IMPORTING


@pytest.mark.parametrize(
    "setting",
    [name if name == "data.dataset" else pytest.param(name, marks=pytest.mark.whole) for name in IMPORTING],
)
def test_no_setting_of_a_run_imports(setting, run, evil, capsys):
    functions = ("evil:make", f"{evil / 'evil.py'}:make")  # both are recognized by the same line for every setting
    for function in functions if setting == "data.dataset" else functions[1:]:
        value = (
            [function] if isinstance(SETTINGS[setting].default, tuple) or setting == "evaluation.metrics" else function
        )
        edit(run / "config.json", {setting: value})
        store_copy(run)
        for mode in ("train", "sample", "edit", "evaluate", "plan"):
            assert call(f"--workdir={run}", f"--mode={mode}") == 2
            assert f"({setting}); to allow it, add " in capsys.readouterr().err
        for mode in ("status", "report"):
            assert call(f"--workdir={run}", f"--mode={mode}") == 0
        new = f"--workdir={evil / 'new'}"
        assert call(f"--pretrained={run}", new) == 2
        call(f"--pretrained={run}", new, "--config.model.kind=evil2.py:make", "--config.diffusion.path=evil2.py:make")
        outer = evil / "outer"
        for group, mode in (("init_from", "sample"), ("sampling.classifier", "sample")):
            shutil.rmtree(outer, ignore_errors=True)
            shutil.copytree(run, outer)
            edit(outer / "config.json", {setting: SETTINGS[setting].default, group: str(run)})
            shutil.rmtree(outer / "checkpoints") if group == "init_from" else None
            call(f"--workdir={outer}", f"--mode={mode}")
        try:
            pretrained.load(run)
        except pretrained.PretrainedError as error:
            assert "imports no code" in str(error) and setting in ("model.kind", "diffusion.path", "diffusion.schedule")
        assert not (evil / "executed").exists()
        capsys.readouterr()


@pytest.fixture
def opened(monkeypatch):
    """The URLs that are opened, each of which then fails."""
    urls = []

    def refuse(url, *_):
        urls.append(url)
        raise StorageError(url)

    monkeypatch.setattr(downloads, "open_store", refuse)
    monkeypatch.setattr(downloads, "download", refuse)
    return urls


@pytest.mark.parametrize("setting", PATHS)
def test_no_url_of_a_run_is_opened(setting, run, opened, capsys):
    """It would be opened with the reader's credentials."""
    for url in ("s3://bucket/x", "hf://owner/x"):
        if setting == "init_from":
            shutil.rmtree(run / "checkpoints" / "1", ignore_errors=True)
        edit(run / "config.json", {setting: url})
        if setting != "init_from":
            store_copy(run)
        mode = "evaluate" if setting.startswith(("data", "evaluation")) else "sample"
        assert call(f"--workdir={run}", f"--mode={mode}") == 2
        assert f"opens {url} ({setting}); to allow it, add --config.{setting}={url}" in capsys.readouterr().err
        for trust in (f"--config.{setting}={url}", "--trust_network"):
            assert cli.parse([f"--workdir={run}", f"--mode={mode}", trust]).config == workdir.load_config(run)
        assert call(f"--workdir={run}", "--mode=status") == 0
        with pytest.raises(pretrained.PretrainedError) if setting == "init_from" else contextlib.nullcontext():
            pretrained.load(run)
        assert not opened
    with pytest.raises(StorageError) if setting in ("init_from", "sampling.classifier") else contextlib.nullcontext():
        pretrained.load(run, network={setting: url})


def test_a_run_with_checkpoints_of_its_own_does_not_open_the_url_that_it_started_from(run, opened):
    """So one's own run that was trained from hf://... is sampled and resumed without a flag."""
    edit(run / "config.json", {"init_from": "hf://owner/x", "model.num_classes": 10})
    cli.parse([f"--workdir={run}", "--mode=sample"])
    assert pretrained.read_class_names(workdir.load_config(run), run) == () and not opened


def test_only_synthetic_data_of_the_package_need_no_permission(run):
    """`python main.py --workdir=runs/series --mode=sample`, as the first pages have it."""
    for function in ("diffusion_jax.data.synthetic:moons", "diffusion_jax.data.synthetic:np.load", "diffusion_jax.x:y"):
        for path in (run / "config.json", run / "checkpoints" / "1" / "config.json"):
            edit(path, {"data.dataset": function})
        if function.endswith("moons"):
            assert cli.parse([f"--workdir={run}", "--mode=sample"]).config.data.dataset == function
            continue
        with pytest.raises(UserError, match="to allow it, add --config.data.dataset="):
            cli.parse([f"--workdir={run}", "--mode=sample"])


def test_a_named_function_is_imported_from_the_named_file_only(run, evil, capsys):
    """A stranger's evil.py is not trusted because one's own file has the same name."""
    theirs = evil / "theirs"
    theirs.mkdir()
    shutil.move(evil / "evil.py", theirs / "evil.py")
    (evil / "evil.py").write_text("from diffusion_jax import schedules\n\n\ndef make():\n    return schedules.edm()\n")
    edit(run / "config.json", {"diffusion.path": f"{theirs / 'evil.py'}:make"})
    store_copy(run)
    with pytest.raises(pretrained.PretrainedError, match=r"--config.diffusion.path=\.\.\. with your copy"):
        pretrained.load(run, network={"model.kind": "evil.py:make"})
    net = pretrained.load(run, network={"diffusion.path": "evil.py:make"})
    assert net.diffusion["path"] == f"{evil / 'evil.py'}:make" and not (theirs / "executed").exists()
    with pytest.raises(pretrained.PretrainedError, match="NoneType"):
        pretrained.load(run, network=True)
    assert (theirs / "executed").exists()


@pytest.mark.parametrize("name", ["FILE", "diffusion_jax.data.synthetic:moons"])
def test_modules_of_the_current_directory_are_not_found(name, evil, tmp_path_factory, monkeypatch):
    """A library that is not installed, such as a tracker, could otherwise be a file of the stranger's."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(evil)])
    own = tmp_path_factory.mktemp("own")
    (own / "beside.py").write_text("def make(): return 1")
    (own / "net.py").write_text("from beside import make")
    assert callable(import_function(f"{own / 'net.py'}:make" if name == "FILE" else name))
    assert importlib.util.find_spec("evil") is None
    sys.modules.pop("beside", None)


@pytest.mark.whole
def test_programs_and_their_workers_import_nothing_from_the_current_directory(tmp_path):
    """The worker is a process as Grain starts it."""
    for module in ("multiprocessing", "socket", "pickle", "numpy", "evil"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('executed')")
    program = tmp_path / "program" / "main.py"
    program.parent.mkdir()
    worker = "worker = get_context('spawn').Process(target=print, args=['worker']); worker.start(); worker.join()"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from multiprocessing import get_context\nfrom diffusion_jax import cli\n"
        f"if __name__ == '__main__':\n    cli.main()\n    {worker}\n"
    )
    done = subprocess.run([sys.executable, program, "weights", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("name ") and done.stdout.endswith("worker\n") and not done.stderr, done.stderr


def test_a_trusted_file_runs_as_it_is_written(run, evil):
    """A compiled copy in __pycache__, which users do not read, may differ from the text."""
    path = evil / "net.py"
    path.write_text("def make(): return 'other'")
    py_compile.compile(str(path), importlib.util.cache_from_source(str(path)))
    status = path.stat()
    path.write_text("def make(): return 'given'")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert import_function(f"{path}:make")() == "given"


# ---- Places


@pytest.mark.parametrize("name", ["checkpoints", "samples", "metrics.jsonl", "samples/images", "wandb"])
def test_links_out_of_a_run_are_refused(name, run, tmp_path, capsys):
    outside = tmp_path / "outside"
    (run / name).parent.mkdir(exist_ok=True)
    if name == "checkpoints":
        shutil.move(run / name, outside)
    elif name == "metrics.jsonl":
        outside.write_text("kept")
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for mode in ("train", "sample", "evaluate"):
        assert call(f"--workdir={run}", f"--mode={mode}") == 2
        error = capsys.readouterr().err
        assert f"error: {run / name} is a link out of the run, to {outside}" in error and "--follow_links" in error
    with pytest.raises(UserError, match="is a link out of the run"):
        train.run(workdir.load_config(run), run)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert call(f"--workdir={run}", "--mode=report") == 0
    if name == "checkpoints":
        assert call(f"--workdir={run}", "--mode=sample", "--follow_links") == 0


def test_a_report_shows_no_file_of_its_reader(run, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private.png")
    (tmp_path / "private.jsonl").write_text('{"step": 7654321, "loss": 1.0}\n')
    launch = {"start": 1, "end": 2, "first_step": 0, "last_step": 1, "stopped_by": "private words"}
    (tmp_path / "private.json").write_text(json.dumps([launch | {"seconds": dict.fromkeys(PARTS, 1.0)}]))
    (run / "goodput.json").symlink_to(tmp_path / "private.json")
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8), "blue").save(run / "samples" / "own.png")
    (run / "samples" / "private.png").symlink_to(tmp_path / "private.png")
    (run / "metrics.jsonl").symlink_to(tmp_path / "private.jsonl")
    page = write_report(open_run_dir(run, follow_links=True)).read_text()
    assert page.count("data:image/") == 1
    assert (
        "Left out, because these links lead outside the run: goodput.json, metrics.jsonl, samples/private.png" in page
    )
    assert "private words" not in page and "7654321" not in page.replace(",", "")
    shutil.rmtree(run / "samples")
    (tmp_path / "pictures").mkdir()
    shutil.move(tmp_path / "private.png", tmp_path / "pictures" / "private.png")
    (run / "samples").symlink_to(tmp_path / "pictures")
    assert "data:image/" not in write_report(run).read_text()


def test_pictures_of_many_pixels_are_left_out(run, monkeypatch):
    monkeypatch.setattr("diffusion_jax.report.figures._MAX_PIXELS", 200)
    (run / "samples").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), "red").save(run / "samples" / f"{i}.png")
    page = write_report(open_run_dir(run)).read_text()
    assert page.count("data:image/") == 1 + 3 and "it has 64 pixels; the limit is 8" in page


@pytest.mark.whole
def test_a_run_that_is_moved_while_it_trains_stops(tmp_path, monkeypatch):
    config = array_config("vectors", write_arrays("vectors", tmp_path / "data.npz"), **{"training.num_steps": 8})
    save = Checkpoints.save

    def save_and_move(self, step, state):
        save(self, step, state)
        self.finish()
        if step == 4:
            (tmp_path / "old").rename(tmp_path / "new")

    monkeypatch.setattr(Checkpoints, "save", save_and_move)
    with pytest.raises(LeaseLostError, match=r"old was moved or deleted .*--workdir=NEW"):
        train.run(config, tmp_path / "old")
    assert not (tmp_path / "old").exists()
    monkeypatch.undo()
    train.run(config, tmp_path / "new")
    train.run(config, tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, *(last_state(config, tmp_path / name) for name in ("new", "straight")))


# ---- Numbers


def test_a_changed_config_is_refused_where_it_decides_numbers(run, capsys):
    edit(run / "config.json", {"diffusion.beta_end": 0.03})
    copy = run / "checkpoints" / "1" / "config.json"

    with pytest.raises(CheckpointError, match=rf"config.json was changed after the checkpoint of step 1 .*rm {copy}"):
        sample.run(workdir.load_config(run), run)
    with pytest.raises(pretrained.PretrainedError, match="config.json was changed after"):
        pretrained.load(run)
    assert call(f"--workdir={run}") == 2
    assert "diffusion.beta_end" in capsys.readouterr().err
    shutil.copy(copy, run / "config.json")  # the first command of the message
    pretrained.load(run)
    edit(run / "config.json", {"diffusion.beta_end": 0.03})
    assert "config.json was changed after" in write_report(run).read_text()
    copy.unlink()  # the second
    capsys.readouterr()
    assert pretrained.load(run).diffusion["beta_end"] == 0.03
    assert "has no copies of config.json to find changes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda run: (run / "checkpoints" / "1" / "config.json").unlink(), "config.json"),
        (lambda run: (run / "checkpoints" / "1" / "data.json").unlink(), "data.json"),
        (lambda run: change_digests(run, lambda table: table.pop("step")), "its step"),
    ],
)
def test_what_a_checkpoint_does_not_store_is_a_note(damage, missing, run, capsys):
    damage(run)
    note = f"{run / 'checkpoints' / '1'} has no copies of {missing} to find changes"
    for use in (lambda: pretrained.load(run), lambda: workdir.open_model(workdir.load_config(run), run)):
        use()
        assert note in capsys.readouterr().out


def test_a_copy_that_was_changed_like_the_config_is_refused(run, capsys):
    copy = run / "checkpoints" / "1" / "config.json"
    for path in (run / "config.json", copy):
        edit(path, {"diffusion.beta_end": 0.03})
    with pytest.raises(
        pretrained.PretrainedError, match=rf"{copy} cannot be used \(its SHA-256 .*; remove it: rm {copy}$"
    ):
        pretrained.load(run)
    copy.unlink()
    pretrained.load(run)
    assert "has no copies of config.json" in capsys.readouterr().out


def test_another_change_of_a_config_is_a_note(run, capsys):
    edit(run / "config.json", {"sampling.steps": 3})
    pretrained.load(run)
    assert "config.json was changed after step 1: sampling.steps" in capsys.readouterr().out
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text())))  # other spaces
    edit(run / "config.json", {"sampling.steps": 2})
    pretrained.load(run)
    assert "changed" not in capsys.readouterr().out


def test_a_config_that_was_deleted_is_not_replaced(run, capsys):
    config = workdir.load_config(run)
    (run / "config.json").unlink()
    other = ConfigDict(config.to_dict())
    other.diffusion.prediction, other.seed = "v", 5
    with pytest.raises(CheckpointError, match="config.json is missing; to restore it: cp "):
        train.run(other, run)
    assert call(f"--workdir={run}", "--mode=sample") == 2
    assert "config.json is missing; to restore it: cp " in capsys.readouterr().err
    (run / "checkpoints" / "1" / "config.json").unlink()
    with pytest.raises(UserError, match="has checkpoints without their config.json"):
        train.run(other, run)


def test_a_changed_scale_of_the_data_is_refused(run):
    stored = json.loads((run / "data.json").read_text())
    stored["normalization"]["x"]["offset"][0] += 1
    (run / "data.json").write_text(json.dumps(stored))
    with pytest.raises(pretrained.PretrainedError, match=r"data.json was changed after .*normalization.x.offset.*cp "):
        pretrained.load(run)
    (run / "data.json").unlink()
    with pytest.raises(pretrained.PretrainedError, match=r"data.json is missing; to restore it: cp "):
        pretrained.load(run)


def test_checkpoints_of_earlier_versions_have_no_copies(run, capsys):
    for name in ("config.json", "data.json"):
        (run / "checkpoints" / "1" / name).unlink()
    change_digests(run, lambda table: table.pop("step"))
    config = workdir.load_config(run)
    train.run(config, run)
    assert capsys.readouterr().out.count("has no copies of its step, config.json, data.json") == 1
    for name in ("config.json", "data.json"):
        assert (run / "checkpoints" / "4" / name).read_bytes() == (run / name).read_bytes()
    pretrained.load(run)
    assert "has no copies" not in capsys.readouterr().out


def test_a_changed_file_of_weights_is_refused(run, tmp_path):
    path = tmp_path / "net.safetensors"
    pretrained.save_safetensors(pretrained.load(run), path)
    pretrained.load(path)
    content = path.read_bytes()
    for old, new in ((b'"num_timesteps\\": 1000', b'"num_timesteps\\": 1001'), (content[-8:-4], b"\0\0\0\0")):
        assert content.count(old) >= 1
        path.write_bytes(content.replace(old, new))
        with pytest.raises(pretrained.PretrainedError, match="was changed after it was written"):
            pretrained.load(path)


def test_more_samples_than_fit_are_refused(run):
    config = workdir.load_config(run)
    config.sampling.num_samples = 10**9
    with pytest.raises(UserError, match=r"num_samples=1000000000 needs 24.0 GB on disk and in memory; .* free"):
        sample.run(config, run)


def test_files_with_values_of_another_kind_are_notes(run, capsys):
    """In a report; --mode=status has one line."""
    edit(run / "data.json", {"images": "x"})
    for lines in (
        [{"step": 10**400, "loss": 1.0}],
        [{"step": 1, "loss": [1]}],
        [{"step": 1, "step_seconds": 0}],
        ["x"],
    ):
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert call(f"--workdir={run}", "--mode=report") == 0
        assert call(f"--workdir={run}", "--mode=status") in (0, 2)
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe{")
    times = dict.fromkeys(PARTS, 1.0)
    for launch in ({}, {"end": 10**400}, {"seconds": times}, {"seconds": times, "start": 0, "end": 1e300}, 3):
        (run / "goodput.json").write_text(json.dumps([launch]))
        assert call(f"--workdir={run}", "--mode=report") == call(f"--workdir={run}", "--mode=status") == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_copy_is_not_restored(run):
    copy = run / "checkpoints" / "1" / "config.json"
    copy.write_text("{")
    with pytest.raises(pretrained.PretrainedError, match=rf"{copy} cannot be used .*; remove it: rm {copy}$"):
        pretrained.load(run)


def test_a_run_without_weights_of_its_own_imports_no_other_network(run, evil):
    inner = evil / "inner"
    shutil.copytree(run, inner)
    edit(run / "config.json", {"init_from": str(inner), "model.kind": f"{evil / 'evil.py'}:make"})
    edit(inner / "config.json", {"model.kind": f"{evil / 'evil.py'}:make"})
    shutil.rmtree(run / "checkpoints" / "1")
    with pytest.raises(pretrained.PretrainedError, match="has no weights of its own"):
        pretrained.load(run, network=lambda: None)
    assert not (evil / "executed").exists()
