"""`python -m diffusion_jax.evaluation`: comparing two sets of images."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation import __main__ as command
from diffusion_jax.evaluation import metrics
from helpers.digits_features import by_hand
from helpers.image_files import all_digits, save
from helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.whole
def test_the_command_writes_records(tmp_path):
    samples = save(tmp_path / "half.npz", all_digits("train")[:200])
    command.main(["digits:train", samples])
    command.main(["digits:train", samples, "--batch_size=50"])  # takes the place of the first
    (record,) = json.loads((tmp_path / "metrics.json").read_text())
    own, all_of_them = (metrics.moments(by_hand(all_digits()[:n])) for n in (200, None))
    assert record["frechet_distance"] == pytest.approx(metrics.frechet_distance(all_of_them, own), rel=1e-4)
    assert record["memorization"]["close_share"] > 0.9 and "fid" not in record
    assert (record["num_samples"], record["num_reference"], record["features"]) == (200, 1498, "digits")
    assert Image.open(tmp_path / record["memorization"]["picture"]).width > 6 * 64
    command.main(["digits:train", save(tmp_path / "more.npz", all_digits()[200:500]), "--metrics=fid,kid"])
    assert not list(
        (tmp_path / "cache" / "diffusion_jax" / "features" / "samples").iterdir()
    )  # and no parts of samples stay
    command.main(["digits:train", "more.npz", "--metrics=precision_recall"])  # adds to what is there
    record = json.loads((tmp_path / "metrics.json").read_text())[-1]
    assert {"frechet_distance", "kernel_distance", "precision"} <= set(record)


def test_each_comparison_has_its_own_picture_beside_the_record(tmp_path, capsys):
    """Each measurement has one of its own, which the same measurement replaces; --output may be a folder, too."""
    one, other = (save(tmp_path / f"{name}.npz", all_digits()[i : i + 40]) for i, name in ((0, "one"), (40, "other")))
    (tmp_path / "out").mkdir()
    asked = ["--metrics=memorization", "--features=test_command:a_function"]
    for samples in (one, other, one):
        command.main([one, samples, *asked, "--output=out"])
    command.main([other, one, *asked, "--output=out/metrics.json"])
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert len(records) == 3 and {record["memorization"]["picture"] for record in records} == pictures
    assert sorted(name.split("_")[1] for name in pictures) == ["one", "one", "other"]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(("output", "written"), [("a/b.c", "a/b.c/metrics.json"), ("new/res.json", "new/res.json")])
def test_the_folder_of_output_is_created(tmp_path, output, written):
    one = save(tmp_path / "one.npz", all_digits()[:20])
    command.main([one, one, "--metrics=memorization", "--features=test_command:a_function", f"--output={output}"])
    (record,) = json.loads((tmp_path / written).read_text())
    assert [path.name for path in tmp_path.rglob("*.png")] == [record["memorization"]["picture"]]
    assert (tmp_path / written).with_name(record["memorization"]["picture"]).is_file()


def a_function(batch):
    """Features of one's own, as --features=module:function names them."""
    return batch.reshape(len(batch), -1)[:, 20:30].astype(np.float32)


def test_the_command_accepts_a_function_and_statistics(tmp_path, capsys):
    drawn = all_digits()
    function = ["--features=test_command:a_function", "--metrics=fid,precision_recall"]
    reference = metrics.moments(a_function(drawn))
    np.savez(tmp_path / "stats.npz", mu=reference.mean, sigma=reference.covariance)
    samples = save(tmp_path / "s.npz", drawn[:300])
    command.main([str(tmp_path / "stats.npz"), samples, *function])
    (record,) = json.loads((tmp_path / "metrics.json").read_text())
    exact = metrics.frechet_distance(reference, metrics.moments(a_function(drawn[:300])))
    assert record["frechet_distance"] == pytest.approx(exact, rel=1e-9)
    assert (
        "precision" not in record and "precision_recall (the reference has statistics only)" in capsys.readouterr().out
    )
    # Of a file with both, as ADM's reference batches, the statistics make the distance, and the images the rest.
    both = save(tmp_path / "both.npz", drawn[:100], mu=reference.mean, sigma=reference.covariance)
    command.main([both, samples, *function, "--output=both.json"])
    (record,) = json.loads((tmp_path / "both.json").read_text())
    assert record["frechet_distance"] == pytest.approx(exact, rel=1e-9)
    shares = metrics.precision_recall(a_function(drawn[:100]), a_function(drawn[:300]))
    assert (record["precision"], record["recall"]) == shares and record["reference_sha256"] != record["samples_sha256"]
    command.main([str(tmp_path / "stats.npz"), both, *function, "--output=swapped.json"])  # as samples, too
    (record,) = json.loads((tmp_path / "swapped.json").read_text())
    assert record["frechet_distance"] == pytest.approx(0, abs=1e-9 * np.trace(reference.covariance))


def another_function(batch):
    return a_function(batch) * 2


def test_two_functions_of_one_file_are_different_features(tmp_path):
    samples = save(tmp_path / "s.npz", all_digits()[:300])
    for name in ("a_function", "another_function"):
        command.main(["digits:train", samples, f"--features=test_command:{name}", "--metrics=fid"])
    one, other = json.loads((tmp_path / "metrics.json").read_text())
    assert other["frechet_distance"] == pytest.approx(4 * one["frechet_distance"], rel=1e-6)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def test_the_command_refuses_invalid_arguments(tmp_path, capsys):
    digit = all_digits()[:20]
    good = save(tmp_path / "good.npz", digit)
    color = save(tmp_path / "color.npz", digit.repeat(3, axis=3))
    floats = save(tmp_path / "floats.npz", digit / np.float32(127.5) - 1)
    flat = save(tmp_path / "flat.npz", digit[0])
    one = save(tmp_path / "one.npz", digit[:1])
    wider = save(tmp_path / "wider.npz", digit.repeat(2, axis=1).repeat(2, axis=2))
    np.save(tmp_path / "bare.npy", digit)
    (tmp_path / "text.json").write_text("text")
    wide, negative = str(tmp_path / "wide.npz"), str(tmp_path / "negative.npz")
    np.savez(wide, mu=np.zeros(3), sigma=np.eye(3))
    np.savez(negative, mu=np.zeros(64), sigma=-np.eye(64))
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((good, color), "8x8 gray images and .*color.npz holds 8x8 color images.*--channels=1 or 3"),
        (("digits", floats), r"float32 \[20, 8, 8, 1\], not uint8 .*round\(\(x \+ 1\) \* 127.5\)"),
        (("digits", flat), r"uint8 \[8, 8, 1\], not uint8 \[N, H, W, 1 or 3\]"),
        (("digits", one), "one.npz: 1 images are too few for fid, which needs 2"),
        (("digits", tmp_path / "none.npz"), "none.npz: no such file"),
        (("digits", "no_such/thing"), "no_such/thing: no such file or folder, and as a data set"),
        ((wide, good, "--features=digits"), "statistics of 3 dimensions, and features of digits have 64"),
        ((negative, good, "--features=digits"), "the covariance has the eigenvalue -1"),
        (("digits", good, "--metrics=is,sfid"), "nothing is left to measure"),
        (("digits", tmp_path / "empty"), "no images below"),
        (("digits", good, "--metrics=fid,fad"), "'fad' is unknown; known: fid, sfid"),
        (("digits", good, "--features=nothing:here"), "cannot be imported"),
        (("digits", good, "--features=inception"), "--inception=PATH is needed"),
        (("digits", good, "--inception=x.pth", "--features=inception"), "x.pth: no such file"),
        ((good, wider), "8x8 gray images and .*wider.npz holds 16x16 gray images, .* not comparable; .*--image_size"),
        (("digits", good, "--output=bare.npy"), "bare.npy"),
        ((good, good, "--features=digits", "--output=text.json"), "is not a valid metrics.json"),
        ((color, color, "--features=digits"), "gray images of 8x8 pixels, not 8x8x3; .*--channels=1"),
    ):
        assert re.search(words, refused(capsys, *arguments)), arguments


DEVICES = """
import jax, sys
from diffusion_jax.evaluation import __main__ as command, metrics
assert jax.device_count() == 8
command.main(["digits:train", "samples.npz", "--batch_size=20", "--output=eight.json"])
"""


@pytest.mark.whole
def test_eight_devices_give_the_metrics_of_one(tmp_path):
    save(tmp_path / "samples.npz", all_digits("test")[:250])
    command.main(["digits:train", "samples.npz", "--output=one.json"])
    (tmp_path / "cache").rename(tmp_path / "of_one")  # or the others would only be read again
    variables = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", DEVICES], cwd=tmp_path, env=variables, check=True, capture_output=True)
    one, eight = (json.loads((tmp_path / f"{name}.json").read_text())[0] for name in ("one", "eight"))
    for name, value in one.items():
        if isinstance(value, float):
            # The kernel distance is a difference of larger sums: to a millionth of what it is uncertain by.
            within = 1e-6 * one["kernel_distance_std"] if name == "kernel_distance" else 0
            assert eight[name] == pytest.approx(value, rel=1e-6, abs=within), name
