"""`diffusion-jax compare`: comparing two sets of images."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import metrics, pictures
from diffusion_jax.evaluation import __main__ as command
from diffusion_jax.evaluation import compare, features
from diffusion_jax.evaluation.features import open_set
from diffusion_jax.metrics import of_arrays, of_features
from helpers.digits_features import by_hand
from helpers.image_files import all_digits, save

pytestmark = pytest.mark.usefixtures("own_cache")


def test_captions_number_the_rows_of_the_file_if_some_are_left_out(tmp_path, monkeypatch):
    rng, found = np.random.default_rng(0), []
    reference, samples = rng.normal(size=(2, 11, 8, 1)).astype(np.float32)
    for name, x in (("reference", reference), ("samples", samples)):
        np.save(tmp_path / f"{name}.npy", x)
    monkeypatch.setattr(compare, "MAX_EXAMPLES", 6)
    draw = pictures.draw_neighbors
    monkeypatch.setattr(pictures, "draw_neighbors", lambda *arguments: found.append(arguments[:2]) or draw(*arguments))
    command.main([*(str(tmp_path / f"{name}.npy") for name in ("reference", "samples")), "--metrics=memorization"])
    ((shown, numbers),) = found
    assert set(numbers) <= set(of_arrays.subset_indices(11, 6))
    np.testing.assert_array_equal(shown, samples[numbers])


@pytest.mark.whole
def test_the_command_writes_records(tmp_path):
    samples = save(tmp_path / "half.npz", all_digits("train")[:200])
    command.main(["digits:train", samples])
    command.main(["digits:train", samples, "--batch_size=50"])  # replaces the first record
    (record,) = json.loads((tmp_path / "metrics.json").read_text())
    own, all_of_them = (of_features.moments(by_hand(all_digits()[:n])) for n in (200, None))
    assert record["frechet_distance"] == pytest.approx(of_features.frechet_distance(all_of_them, own), rel=1e-4)
    assert record["memorization"]["close_share"] > 0.9 and "fid" not in record
    assert (record["num_samples"], record["num_reference"], record["features"]) == (200, 1498, "digits")
    assert Image.open(tmp_path / record["files"]["memorization"]).width > 6 * 64
    cache = tmp_path / "cache" / "diffusion_jax" / "features"
    assert not list((cache / "samples").iterdir()) and list((cache / "references").iterdir())
    for names in ("fid,kid", "precision_recall"):  # the second record is added to the first
        command.main(["digits:train", save(tmp_path / "more.npz", all_digits()[200:500]), f"--metrics={names}"])
    record = json.loads((tmp_path / "metrics.json").read_text())[-1]
    assert {"frechet_distance", "kernel_distance", "precision"} <= set(record)


def a_function(batch):
    """A user's own features, named by --features=module:function."""
    return batch.reshape(len(batch), -1)[:, 20:30].astype(np.float32)


def test_the_command_accepts_a_function_and_statistics(tmp_path, capsys):
    drawn = all_digits()
    function = ["--features=test_command:a_function", "--metrics=fid,precision_recall"]
    reference = of_features.moments(a_function(drawn))
    np.savez(tmp_path / "stats.npz", mu=reference.mean, sigma=reference.covariance)
    samples = save(tmp_path / "s.npz", drawn[:300])
    command.main([str(tmp_path / "stats.npz"), samples, *function])
    (record,) = json.loads((tmp_path / "metrics.json").read_text())
    exact = of_features.frechet_distance(reference, of_features.moments(a_function(drawn[:300])))
    assert record["frechet_distance"] == pytest.approx(exact, rel=1e-9)
    note = "precision_recall (the reference has statistics only)"
    assert "precision" not in record and note in capsys.readouterr().out
    assert record["notes"] == {}
    command.main([str(tmp_path / "stats.npz"), save(tmp_path / "few.npz", drawn[:8]), *function, "--output=few.json"])
    (record,) = json.loads((tmp_path / "few.json").read_text())
    assert record["notes"]["frechet_distance"].startswith("8 samples for 10 dimensions: the distance is larger")
    own = ["--metrics=helpers.own_networks:mean_shift,energy_distance", "--output=own.json"]
    command.main([save(tmp_path / "all.npz", drawn), samples, *own])
    (record,) = json.loads((tmp_path / "own.json").read_text())
    assert record["mean_shift"] == pytest.approx(drawn[:300].mean() - drawn.mean(), rel=1e-4)
    with pytest.raises(SystemExit):
        command.main([samples, samples, "--metrics=helpers.own_networks:steps", "--output=own.json"])
    assert "steps returned steps, which the record already has; choose another name" in capsys.readouterr().err
    # If a file has both, as ADM's reference batches, the distance uses the statistics, and other metrics use the images.
    statistics = {"mu": reference.mean, "sigma": reference.covariance}
    both = save(tmp_path / "both.npz", drawn[:100], **statistics, mu_s=np.zeros(3), sigma_s=np.eye(3))
    assert open_set(both).statistics.spatial.count == 0
    command.main([both, samples, *function, "--output=both.json"])
    (record,) = json.loads((tmp_path / "both.json").read_text())
    assert record["frechet_distance"] == pytest.approx(exact, rel=1e-9)
    shares = of_features.precision_recall(a_function(drawn[:100]), a_function(drawn[:300]))
    assert (record["precision"], record["recall"]) == shares and record["reference_sha256"] != record["samples_sha256"]


def test_the_command_compares_arrays_and_images_by_their_values(tmp_path):
    """Arrays are standardized by the reference's channels; images can be compared by gray levels."""
    one, other = (300 + 10 * np.random.default_rng(seed).standard_normal((60, 2)).astype(np.float32) for seed in (0, 1))
    np.save(tmp_path / "one.npy", one)
    command.main([str(tmp_path / "one.npy"), save(tmp_path / "other.npz", other), "--output=arrays.json"])
    (record,) = json.loads((tmp_path / "arrays.json").read_text())
    mean, deviation = (f(one.astype(np.float64), axis=0) for f in (np.mean, np.std))
    expected = of_arrays.energy_distance(*((x - mean) / deviation for x in (one, other)))
    assert record["energy_distance"] == pytest.approx(expected.value, rel=1e-4)
    assert record["features"] is None and "power_spectrum_z" not in record
    drawn = [save(tmp_path / f"{i}.npz", all_digits()[i : i + 50]) for i in (0, 50)]
    command.main([*drawn, "--metrics=energy_distance", "--output=images.json"])
    (record,) = json.loads((tmp_path / "images.json").read_text())
    expected = of_arrays.energy_distance(all_digits()[:50], all_digits()[50:100])
    assert record["energy_distance"] == pytest.approx(expected.value, rel=1e-9)


@pytest.mark.parametrize("max_bytes", [0, 2**30])
def test_a_metric_of_the_user_gets_every_digit_of_narrow_data(max_bytes, tmp_path, monkeypatch):
    """Values of 1e6 plus or minus 0.1 have 14 different numbers in float32; other data are float32 in both sets."""
    monkeypatch.setattr(features, "_MAX_BYTES_IN_MEMORY", max_bytes)
    rng = np.random.default_rng(0)
    for mean, deviation in ((1e6, 0.1), (300.0, 10.0)):
        drawn = [mean + deviation * rng.standard_normal((50, 1)) for _ in range(2)]
        paths = [save(tmp_path / f"{i}.npz", x) for i, x in enumerate(drawn)]
        command.main([*paths, "--metrics=helpers.own_networks:distinct_values", "--output=own.json"])
        record = json.loads((tmp_path / "own.json").read_text())[-1]
        expected = [len(np.unique(x if mean == 1e6 else x.astype(np.float32))) for x in drawn]
        assert [record["in_reference"], record["in_samples"]] == expected and expected[0] > 45


def test_a_metric_of_the_user_gets_the_labels_and_conditions_of_its_examples(tmp_path, capsys, monkeypatch):
    for module in (metrics, compare):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 40)  # the same rows of every array
    x, labels = all_digits()[:100], np.arange(100) % 10
    condition, missing = labels[:, None] * np.float32([1, 2]), labels == 3
    one = save(tmp_path / "one.npz", x, arr_1=labels)
    other = save(
        tmp_path / "other.npz", x[:50], arr_1=labels[:50], condition=condition[:50], condition_missing=missing[:50]
    )
    own = "--metrics=helpers.own_networks:by_class,helpers.own_networks:by_condition"
    command.main([one, other, own, "--output=own.json"])
    (record,) = json.loads((tmp_path / "own.json").read_text())
    means, rows = (x.mean(axis=(1, 2, 3)) / (labels + 1), [of_arrays.subset_indices(n, 40) for n in (100, 50)])
    assert [record["one"], record["other"]] == pytest.approx([means[i].mean() for i in rows], rel=1e-6)
    assert record["condition"] == pytest.approx(condition[rows[1]][~missing[rows[1]]].mean())
    assert record["has_label"] == 1
    bare = save(tmp_path / "bare.npz", x)
    line = refused(capsys, one, bare, own)
    assert "helpers.own_networks:by_class takes samples_label, but there is no label with the samples" in line
    command.main([bare, other, own.replace("by_class", "mean_shift"), "--output=bare.json"])
    assert json.loads((tmp_path / "bare.json").read_text())[0]["has_label"] == 0


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def test_the_command_refuses_invalid_arguments(tmp_path, capsys):
    digit = all_digits()[:20]
    good = save(tmp_path / "good.npz", digit)
    floats = save(tmp_path / "floats.npz", digit / np.float32(127.5) - 1)
    wider = save(tmp_path / "wider.npz", digit.repeat(2, axis=1).repeat(2, axis=2))
    wide, negative = str(tmp_path / "wide.npz"), str(tmp_path / "negative.npz")
    np.savez(wide, mu=np.zeros(3), sigma=np.eye(3))
    np.savez(negative, mu=np.zeros(64), sigma=-np.eye(64))
    for arguments, words in (
        (("digits", floats), r"float32 \[20, 8, 8, 1\], but digits.* has images, uint8 .*round\(\(x \+ 1\) \* 127.5\)"),
        (("digits", "no_such/thing"), "no_such/thing: no such file or folder, and as a data set"),
        ((wide, good, "--features=digits"), "the features have 3 and 64 dimensions"),
        ((negative, good, "--features=digits"), "the covariance has the eigenvalue -1"),
        (("digits", good, "--metrics=is,sfid"), "none of the metrics can be computed"),
        (("digits", good, "--metrics=fid,fad"), "'fad' is unknown; known: fid, sfid"),
        (("digits", good, "--features=inception"), "need inception=PATH, the weights of FID"),
        ((good, wider, "--features=digits"), "8x8 images and .*wider.npz has 16x16 images, .*--image_size"),
    ):
        assert re.search(words, refused(capsys, *arguments)), arguments


def test_a_link_to_nothing_is_not_the_newest_file(tmp_path):
    (tmp_path / "samples").mkdir()
    path = save(tmp_path / "samples" / "a.npz", np.zeros((3, 2), np.float32))
    (tmp_path / "samples" / "b.npz").symlink_to("gone.npz")
    assert str(features.sample_files(tmp_path)[0]) == path


def test_only_labels_are_read_beside_the_samples(tmp_path):
    """Another array of that name may be of any size: its header is read alone."""
    for labels, expected in ((np.arange(3), [0, 1, 2]), (np.zeros((3, 1000)), None), (np.arange(4), None)):
        path = save(tmp_path / "x.npz", np.zeros((3, 2), np.float32), arr_1=labels)
        found = open_set(str(path)).source.arrays.get("label")
        assert (None if found is None else found.tolist()) == expected
