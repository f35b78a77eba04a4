"""From sets of images to a record of metrics: reading, resizing, features in parts, the command, the mode."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, training
from diffusion_jax.distributed import sharding
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import __main__ as command
from diffusion_jax.evaluation import (
    digits_classifier,
    feature_extraction,
    feature_extractors,
    image_sets,
    metric_suite,
    metrics,
)
from diffusion_jax.pretrained import PretrainedError, inception
from diffusion_jax.runs import sample, sample_metrics, sampling_setup, train, trained_model, workdir
from diffusion_jax.runs.console import ProgressBar
from diffusion_jax.runs.image_generator import Generator
from diffusion_jax.runs.preview import make_preview_sampler
from diffusion_jax.runs.sample_files import SampleFile, read_settings
from diffusion_jax.training.checkpoints import Checkpoints
from helpers import inception_peer
from helpers.configs import tiny_config
from helpers.digits_features import by_hand
from helpers.paths import ROOT
from helpers.program import evaluate


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Features of other tests' images stay theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def all_digits(split="train"):
    source = data.Digits(split, (8, 8), 1)
    return source.read(np.arange(len(source)))[0]


def save(path, array, **more):
    np.savez(path, array, **more)
    return str(path)


def mesh():
    return sharding.make_mesh({"data": -1, "fsdp": 1})


# ---- Inception's weights and resize


NAMES = {  # as the port's converter matched them
    "conv/conv2d_params": "Conv2d_1a_3x3.conv.weight",
    "conv_4/batchnorm/gamma": "Conv2d_4a_3x3.bn.weight",
    "mixed/conv/batchnorm/beta": "Mixed_5b.branch1x1.bn.bias",
    "mixed_2/tower/conv_1/batchnorm/moving_mean": "Mixed_5d.branch5x5_2.bn.running_mean",
    "mixed_3/conv/conv2d_params": "Mixed_6a.branch3x3.conv.weight",
    "mixed_3/tower/conv_2/conv2d_params": "Mixed_6a.branch3x3dbl_3.conv.weight",
    "mixed_6/tower_1/conv_4/batchnorm/moving_variance": "Mixed_6d.branch7x7dbl_5.bn.running_var",
    "mixed_7/tower_2/conv/conv2d_params": "Mixed_6e.branch_pool.conv.weight",
    "mixed_8/tower/conv/conv2d_params": "Mixed_7a.branch3x3_1.conv.weight",
    "mixed_8/tower_1/conv_3/conv2d_params": "Mixed_7a.branch7x7x3_4.conv.weight",
    "mixed_9/tower/mixed/conv_1/conv2d_params": "Mixed_7b.branch3x3_2b.conv.weight",
    "mixed_10/tower_1/mixed/conv/conv2d_params": "Mixed_7c.branch3x3dbl_3a.conv.weight",
    "mixed_10/tower_1/conv_1/conv2d_params": "Mixed_7c.branch3x3dbl_2.conv.weight",
    "softmax/weights": "fc.weight",
    "softmax/biases": "fc.bias",
}


@pytest.fixture(scope="module")
def redrawn():
    """Parameters at random, flat."""
    return inception_peer.redrawn()


@pytest.fixture(scope="module")
def port(redrawn, tmp_path_factory):
    """The same as a file with the port's names and layouts."""
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("port") / "inception.safetensors"
    save_file(inception_peer.as_port(redrawn), path)
    return path


def test_the_port_and_the_graph_hold_the_same(redrawn, port, tmp_path, monkeypatch):
    import tensorflow as tf

    names = {inception._graph_name(path): inception._torch_name(path) for path in redrawn}
    assert len(names) == len(redrawn) == 472 and NAMES.items() <= names.items()
    graph = tf.compat.v1.GraphDef()
    graph.node.add(name="DecodeJpeg/contents", op="Placeholder")
    graph.node.add(name="mixed/join/concat_dim", op="Const")
    for path, value in redrawn.items():
        node = graph.node.add(name=inception._graph_name(path), op="Const")
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph.SerializeToString())
    ported, frozen = inception.load_inception(port), inception.load_inception(path)
    assert not frozen.published and not ported.published and frozen.digest != ported.digest
    monkeypatch.setattr(inception, "_PORT_SHA256", ported.digest)
    monkeypatch.setattr(inception, "_GRAPH_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    assert inception.load_inception(port).published and inception.load_inception(path).published
    for found in (ported, frozen):
        found = flax.traverse_util.flatten_dict(found.params)
        assert found.keys() == redrawn.keys()
        for at, value in redrawn.items():
            np.testing.assert_array_equal(found[at], value)


def test_wrong_weight_files(port, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(port)
    for name, change, words in (
        ("torchvision", {"fc.weight": np.zeros((1000, 2048), np.float32)}, "torchvision's InceptionV3"),
        ("more", {"AuxLogits.fc.weight": np.zeros(3, np.float32)}, "1 are left over .AuxLogits.fc.weight"),
        ("shape", {"Mixed_5b.branch1x1.conv.weight": np.zeros((64, 9, 1, 1), np.float32)}, "1 shapes differ"),
        ("nan", {"fc.bias": np.full(1008, np.nan, np.float32)}, "not finite"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors | change, path)
        with pytest.raises(PretrainedError, match=words):
            inception.load_inception(path)
    (tmp_path / "torn.pb").write_bytes(b"\n\x90torn")
    with pytest.raises(PretrainedError, match="cannot be read as a TensorFlow graph"):
        inception.load_inception(tmp_path / "torn.pb")
    with pytest.raises(PretrainedError, match="no such file; .*6726825d"):
        inception.load_inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="resize='bilinear' is unknown; known: tf1, pytorch, clean"):
        feature_extractors.inception(port, "bilinear")


@pytest.mark.parametrize("shape", [(32, 32), (47, 33), (299, 299), (400, 301)])
def test_the_resize_is_tensorflow_1_s(shape):
    """Its own kernel, which TensorFlow still has."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (2, *shape, 3)).astype(np.float32)
    theirs = tf.compat.v1.image.resize_bilinear(drawn, (299, 299), align_corners=False, half_pixel_centers=False)
    ours = np.asarray(feature_extractors.to_inception(drawn, "tf1")) * 128 + 128
    np.testing.assert_allclose(ours, theirs, atol=255 * 2**-22)  # two roundings of float32


def test_the_clean_resize_is_pillow_s():
    """Where it shrinks, too, which is where it differs from others."""
    for shape in ((32, 32), (400, 301), (700, 650)):
        drawn = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.float32)
        channels = [Image.fromarray(drawn[..., i]).resize((299, 299), Image.Resampling.BICUBIC) for i in range(3)]
        theirs = np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 255)
        ours = np.asarray(feature_extractors.to_inception(drawn[None], "clean"))[0] * 128 + 128
        np.testing.assert_allclose(ours, theirs, atol=0.01)  # of 255; Pillow rounds between its two passes


def test_features_of_inception(port):
    """Those that torch-fidelity had for the same weights and images; and a gray image is a color one with equal channels."""
    extractor = feature_extractors.inception(port)
    stored = np.load(inception_peer.FIXTURE)
    extraction = feature_extraction.FeaturePipeline(extractor, mesh(), 2, ProgressBar)
    found = extraction(stored["images"])
    for ours, theirs in (
        (found.pool, stored["pool"]),
        (found.spatial, stored["spatial"]),
        (found.pool @ extractor.head, stored["logits"]),
    ):
        assert theirs.std() > 1e-3 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    gray = stored["images"][..., :1]
    one, three = extraction(gray).pool, extraction(gray.repeat(3, axis=-1)).pool
    np.testing.assert_allclose(one, three, atol=1e-5 * three.max())  # two programs, as above


# ---- reading


def test_npz_files_are_read_as_they_are_asked_for(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    plain, packed = save(tmp_path / "plain.npz", drawn, arr_1=np.arange(9)), tmp_path / "packed.npz"
    np.savez_compressed(packed, drawn)
    for path in (plain, str(packed)):
        source = image_sets.open_image_set(path).images
        assert len(source) == 9
        np.testing.assert_array_equal(source.read(np.array([7, 2]))[0], drawn[[7, 2]])
    assert isinstance(image_sets.open_image_set(plain).images._images, np.memmap)


def test_a_folder_is_read_as_it_is(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.testing.assert_array_equal(image_sets.open_image_set(str(folder)).images.read(np.arange(3))[0], drawn)
    Image.fromarray(drawn[0, :5]).save(folder / "z.png")
    with pytest.raises(data.DataError, match="z.png is 9x5, and the first image 9x6"):
        image_sets.open_image_set(str(folder)).images.read(np.arange(4))
    assert image_sets.open_image_set(str(folder), image_size=8).images.read(np.arange(4))[0].shape == (4, 8, 8, 3)
    turned = Image.fromarray(drawn[0])
    turned.getexif()[0x0112] = 6  # to be turned by a quarter: then it is no longer of that size
    turned.save(folder / "z.png", exif=turned.getexif())
    with pytest.raises(data.DataError, match="z.png is 6x9"):
        image_sets.open_image_set(str(folder)).images.read(np.arange(4))


def test_a_gray_folder_never_loses_colors(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(drawn[..., 0]).save(folder / "a.png")
    assert image_sets.open_image_set(str(folder)).images.read(np.arange(1))[0].shape == (1, 8, 8, 1)
    assert image_sets.open_image_set(str(folder), image_size=4).images.read(np.arange(1))[0].shape == (1, 4, 4, 1)
    Image.fromarray(drawn).save(folder / "b.png")
    expected = drawn[..., :1].repeat(3, axis=2), drawn
    for first in ("a.png", "b.png"):  # whichever comes first
        found = image_sets.open_image_set(str(folder)).images.read(np.arange(2))[0]
        assert found.shape == (2, 8, 8, 3)
        np.testing.assert_array_equal(
            sorted(found.reshape(2, -1).tolist()), sorted(x.ravel().tolist() for x in expected)
        )
        (folder / first).rename(folder / f"z{first}")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_channels_that_are_asked_for(tmp_path, channels):
    """Of a folder, an .npz and a data set; a color image becomes gray as Pillow has it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{i}.png")
    color, gray = save(tmp_path / "color.npz", drawn), save(tmp_path / "gray.npz", drawn[..., :1])
    as_gray = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in drawn])[..., None]
    for what, expected in (
        (str(folder), drawn if channels == 3 else as_gray),
        (color, drawn if channels == 3 else as_gray),
        (gray, drawn[..., :1].repeat(channels, axis=3)),
        ("digits:train", all_digits()[:2].repeat(channels, axis=3)),
    ):
        found = image_sets.open_image_set(what, channels=channels).images.read(np.arange(2))[0]
        np.testing.assert_array_equal(found, expected)


def test_a_run_s_newest_samples(tmp_path):
    run = tmp_path / "run" / "samples"
    run.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run without samples"):
        image_sets.open_image_set(str(run.parent))
    for i, name in enumerate(("b.npz", "a.npz", "edit_inpaint.npz", "c.partial.npz")):
        save(run / name, all_digits()[:2])
        os.utime(run / name, (i, i))
    assert image_sets.open_image_set(str(run.parent)).name == str(run / "a.npz")


def test_statistics_of_others(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 64))
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    np.savez(tmp_path / "alone.npz", mu=mu, sigma=sigma)
    alone = image_sets.open_image_set(str(tmp_path / "alone.npz"))
    assert alone.images is None and alone.statistics.spatial is None
    np.testing.assert_array_equal(alone.statistics.moments.covariance, sigma)
    both = image_sets.open_image_set(
        save(tmp_path / "b.npz", all_digits()[:9], mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    )
    assert len(both.images) == 9 and both.statistics.spatial is not None


# ---- extraction


def test_the_digits_network_reads_digits():
    params, _ = digits_classifier.load()
    source = data.Digits("test", (8, 8), 1)
    drawn, labels = source.read(np.arange(len(source)))
    judged = digits_classifier.DigitsNetwork().apply({"params": params}, drawn)
    assert (judged.logits.argmax(-1) == labels).mean() > 0.98


@pytest.mark.parametrize("batch_size", [7, 64])
def test_no_figure_depends_on_the_batch_size_and_no_image_is_lost(batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_extraction, "CHUNK", 50)
    extraction = feature_extraction.FeaturePipeline(feature_extractors.digits(), mesh(), batch_size, ProgressBar)
    source = image_sets.open_image_set(save(tmp_path / "x.npz", all_digits()[:151])).images
    found = extraction.extract_set("x", source, tmp_path / str(batch_size))
    expected = by_hand(all_digits()[:151])
    np.testing.assert_allclose(found.pool, expected, atol=1e-5 * expected.max())
    assert found.moments.count == 151 and found.spatial is None
    np.testing.assert_allclose(found.moments.covariance, np.cov(expected, rowvar=False), atol=1e-5)


def test_an_interrupted_extraction_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_extraction, "CHUNK", 20)
    calls = []

    def judge_images(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch.reshape(len(batch), -1)[:, :5].astype(np.float32)

    extraction = feature_extraction.FeaturePipeline(
        feature_extractors.from_function(judge_images, "mine", "1"), mesh(), 20, ProgressBar
    )
    source = image_sets.open_image_set(save(tmp_path / "x.npz", all_digits()[:90])).images
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_set("x", source, tmp_path / "parts")
    found = extraction.extract_set("x", source, tmp_path / "parts")
    assert len(calls) == 3 + 3 and len(found.pool) == 90  # two parts were kept
    extraction.extract_set("x", source, tmp_path / "parts")
    assert len(calls) == 6  # all of them now
    found.delete_cache()
    assert not any((tmp_path / "parts").iterdir())


def test_features_that_are_none(tmp_path):
    for function, words in (
        (lambda x: np.zeros((len(x), 2, 2)), r"4 images features of shape \(4, 2, 2\), not \[4, D\]"),
        (lambda x: np.zeros((1, 2)), r"4 images features of shape \(1, 2\)"),
        (lambda x: np.full((len(x), 2), np.nan), "not finite"),
    ):
        extraction = feature_extraction.FeaturePipeline(
            feature_extractors.from_function(function, "mine", "1"), mesh(), 4, ProgressBar
        )
        with pytest.raises(ValueError, match=words):
            extraction(all_digits()[:3])


def test_names_of_metrics():
    published = feature_extractors.FeatureExtractor("inception", "0", None, resize="tf1", published=True)
    assert [metric_suite.reported_name(metric, published) for metric in ("fid", "sfid", "is")] == [
        "fid",
        "sfid",
        "inception_score",
    ]
    assert metric_suite.reported_name("fid", published._replace(resize="clean")) == "fid_clean"
    assert (
        metric_suite.reported_name("fid", published._replace(resize="clean", published=False))
        == "frechet_distance_clean"
    )
    for substitute in (published._replace(published=False), feature_extractors.digits()):
        assert metric_suite.reported_name("fid", substitute) == "frechet_distance"


def test_published_inception_has_all_metrics_and_others_have_fewer():
    """On arrays in place of features: which figures there are, and that each is its own function's."""
    rng = np.random.default_rng(0)
    pools = [rng.normal(size=(40, 6)).astype(np.float32) for _ in range(2)]
    extractor = feature_extractors.FeatureExtractor("inception", "0", None, None, rng.normal(size=(6, 10)), "tf1", True)
    sets = [
        feature_extraction.SetFeatures(pool, metrics.moments(pool), metrics.moments(pool[:, :3]), "0") for pool in pools
    ]
    said = []
    found = metric_suite.compute_metrics(*sets, extractor, metric_suite.METRICS, said.append)
    assert found["fid"] == metrics.frechet_distance(sets[0].moments, sets[1].moments)
    assert found["sfid"] == metrics.frechet_distance(sets[0].spatial, sets[1].spatial)
    assert found["kid"] == metrics.kid(*pools, 100, 10).mean and found["kid_subset_size"] == 10
    assert found["inception_score"] == metrics.inception_score(pools[1] @ extractor.head).mean
    assert (found["precision"], found["recall"]) == metrics.precision_recall(*pools)
    assert (found["density"], found["coverage"]) == metrics.density_coverage(*pools)
    assert not said
    assert found["inception_score_std"] == 0 and found["inception_score_split_size"] == 5000
    assert found["kid_standard_error"] == metrics.kid(*pools, 100, 10).standard_error
    assert not metric_suite.unavailable_metrics(False, True, extractor, metric_suite.METRICS)
    assert list(metric_suite.unavailable_metrics(True, False, extractor, metric_suite.METRICS)) == [
        "sfid",
        "kid",
        "precision_recall",
        "density_coverage",
        "memorization",
    ]
    assert list(metric_suite.unavailable_metrics(False, False, feature_extractors.digits(), metric_suite.METRICS)) == [
        "sfid",
        "is",
    ]


def test_copies_are_found():
    reference = np.random.default_rng(0).normal(size=(500, 8))
    fresh = np.random.default_rng(1).normal(size=(400, 8))
    report, _ = metric_suite.memorization_report(reference, fresh)
    assert report["close_share"] < 0.05
    fresh[:100] = reference[200:300] + 1e-3
    report, near = metric_suite.memorization_report(reference, fresh)
    assert 0.25 <= report["close_share"] < 0.3 and (near.indices[:100, 0] == np.arange(200, 300)).all()
    reference[10:20] = reference[:10]  # duplicates of its own must not hide them
    assert metric_suite.memorization_report(reference, reference[:300])[0]["close_share"] == 1


# ---- the command


def test_the_command_and_its_table(tmp_path, capsys):
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
    capsys.readouterr()
    command.main(["table", str(tmp_path)])
    header, _, first, second = capsys.readouterr().out.splitlines()
    assert "frechet_distance" in header and f"{record['frechet_distance']:.4g}" in first and "300" in second
    assert "half.npz" in first and "more.npz" in second and "reference" not in header  # what differs is shown
    assert not list(
        (tmp_path / "cache" / "diffusion_jax" / "features" / "samples").iterdir()
    )  # and no parts of samples stay
    command.main(["digits:train", "more.npz", "--metrics=precision_recall"])  # adds to what is there
    record = json.loads((tmp_path / "metrics.json").read_text())[-1]
    assert {"frechet_distance", "kernel_distance", "precision"} <= set(record)


def test_the_table_has_bits_per_dimension(tmp_path, capsys):
    """In the row of the weights they are of, or in a row of their own."""
    bound = {"bits_per_dim": 3.7043, "bits_per_dim_standard_error": 0.012, "step": 500, "weights": "ema"}
    bound |= {"dataset": "cifar10", "prior": 1e-5, "prior_standard_error": None}
    record = {"frechet_distance": 12.5, "step": 500, "weights": "ema", "dataset": "cifar10"}
    for name, metrics_json, likelihood_json in (
        ("both", [record, record | {"weights": "raw"}], bound),
        ("other", [record], bound | {"step": 400}),
        ("alone", None, bound | {"weights": "raw"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "likelihood.json").write_text(json.dumps(likelihood_json))
        if metrics_json:
            (tmp_path / name / "metrics.json").write_text(json.dumps(metrics_json))
    command.main(["table", *(str(tmp_path / name) for name in ("both", "other", "alone"))])
    found = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.out.splitlines()]
    columns = {name: [row[i] for row in rows[2:]] for i, name in enumerate(rows[0])}
    value = "3.704 ± 0.01"
    assert columns["bits_per_dim"] == [value, "", "", value, value] and not found.err
    assert columns["frechet_distance"] == ["12.5", "12.5", "12.5", "", ""]
    assert columns["step"] == ["500", "500", "500", "400", "500"]
    assert columns["weights"] == ["ema", "raw", "ema", "ema", "raw"] and "prior" not in columns
    (tmp_path / "both" / "likelihood.json").write_text("[]")
    assert "both/likelihood.json is not a valid likelihood.json" in refused(capsys, "table", tmp_path / "both")


def test_pictures_go_beside_the_record_and_stay(tmp_path, capsys):
    """Each measurement has one of its own, which the same measurement replaces; --output may be a folder, too."""
    one, other = (save(tmp_path / f"{name}.npz", all_digits()[i : i + 40]) for i, name in ((0, "one"), (40, "other")))
    (tmp_path / "out").mkdir()
    asked = ["--metrics=memorization", "--features=test_judging:a_function"]
    for samples in (one, other, one):
        command.main([one, samples, *asked, "--output=out"])
    command.main([other, one, *asked, "--output=out/metrics.json"])
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert len(records) == 3 and {record["memorization"]["picture"] for record in records} == pictures
    assert sorted(name.split("_")[1] for name in pictures) == ["one", "one", "other"]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ("new/", "new/metrics.json"),
        ("new", "new/metrics.json"),
        ("a/b.c/", "a/b.c/metrics.json"),
        ("a/b.c", "a/b.c/metrics.json"),
        ("new/res.json", "new/res.json"),
        ("dir.json/", "dir.json/metrics.json"),
    ],
)
def test_the_folder_of_output_is_created(tmp_path, output, written):
    one = save(tmp_path / "one.npz", all_digits()[:20])
    command.main([one, one, "--metrics=memorization", "--features=test_judging:a_function", f"--output={output}"])
    (record,) = json.loads((tmp_path / written).read_text())
    assert [path.name for path in tmp_path.rglob("*.png")] == [record["memorization"]["picture"]]
    assert (tmp_path / written).with_name(record["memorization"]["picture"]).is_file()


def test_messages_say_where_inception_s_weights_are(tmp_path, capsys):
    good, url = (
        save(tmp_path / "good.npz", all_digits()[:20]),
        "https://github.com/mseitzer/pytorch-fid/releases/download/",
    )
    assert url in refused(capsys, "digits", good, "--features=inception")
    assert url in refused(capsys, "digits", good, "--inception=x.pth", "--features=inception")
    with pytest.raises(UserError, match=url):
        sample_metrics.run(tiny_config(**OVERRIDES, **{"evaluation.features": "inception"}), tmp_path)


def a_function(batch):
    """Features of one's own, as --features=module:function names them."""
    return batch.reshape(len(batch), -1)[:, 20:30].astype(np.float32)


def test_the_command_takes_a_function_and_statistics(tmp_path, capsys):
    drawn = all_digits()
    function = ["--features=test_judging:a_function", "--metrics=fid,precision_recall"]
    reference = metrics.moments(a_function(drawn))
    np.savez(tmp_path / "stats.npz", mu=reference.mean, sigma=reference.covariance)
    samples = save(tmp_path / "s.npz", drawn[:300])
    command.main([str(tmp_path / "stats.npz"), samples, *function])
    (record,) = json.loads((tmp_path / "metrics.json").read_text())
    exact = metrics.frechet_distance(reference, metrics.moments(a_function(drawn[:300])))
    assert record["frechet_distance"] == pytest.approx(exact, rel=1e-9)
    assert (
        "precision" not in record and "precision_recall (the reference is statistics alone)" in capsys.readouterr().out
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


def test_two_functions_of_one_file_are_two(tmp_path):
    samples = save(tmp_path / "s.npz", all_digits()[:300])
    for name in ("a_function", "another_function"):
        command.main(["digits:train", samples, f"--features=test_judging:{name}", "--metrics=fid"])
    one, other = json.loads((tmp_path / "metrics.json").read_text())
    assert other["frechet_distance"] == pytest.approx(4 * one["frechet_distance"], rel=1e-6)


mesh_shape = (1, 1)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def test_what_the_command_refuses(tmp_path, capsys):
    digit = all_digits()[:20]
    good = save(tmp_path / "good.npz", digit)
    color = save(tmp_path / "color.npz", digit.repeat(3, axis=3))
    floats = save(tmp_path / "floats.npz", digit / np.float32(255))
    signed = save(tmp_path / "signed.npz", digit / np.float32(127.5) - 1)
    nans = save(tmp_path / "nans.npz", np.where(digit == 0, np.nan, digit))
    flat = save(tmp_path / "flat.npz", digit[0])
    one = save(tmp_path / "one.npz", digit[:1])
    five = save(tmp_path / "five.npz", digit[:5])
    wider = save(tmp_path / "wider.npz", digit.repeat(2, axis=1).repeat(2, axis=2))
    np.save(tmp_path / "bare.npy", digit)
    (tmp_path / "text.json").write_text("text")
    wide, negative = str(tmp_path / "wide.npz"), str(tmp_path / "negative.npz")
    np.savez(wide, mu=np.zeros(3), sigma=np.eye(3))
    np.savez(negative, mu=np.zeros(64), sigma=-np.eye(64))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((good, color), "8x8 gray images and .*color.npz 8x8 color ones.*--channels=1 or 3"),
        (("digits", floats), r"float32 from 0 to 1, not uint8 from 0 to 255; save round\(x \* 255\)"),
        (("digits", signed), r"float32 from -1 to 1, .*round\(\(x \+ 1\) \* 127.5\)"),
        (("digits", nans), "not finite"),
        (("digits", flat), r"uint8 \[8, 8, 1\], not uint8 \[N, H, W, 1 or 3\]"),
        (("digits", one), "one.npz: 1 images are too few for fid, which needs 2"),
        (("digits", five), "five.npz: 5 images are too few for kid, which needs 8"),
        (("digits", tmp_path / "torn.npz"), "torn.npz is no .npz"),
        (("digits", tmp_path / "bare.npy"), "bare.npy is no .npz"),
        (("digits", tmp_path / "none.npz"), "none.npz: no such file"),
        (("digits", "no_such/thing"), "no_such/thing: no such file or folder, and as a data set"),
        ((wide, good, "--features=digits"), "statistics of 3 dimensions, and features of digits have 64"),
        ((negative, good, "--features=digits"), "a covariance with the eigenvalue -1 is none"),
        (("digits", good, "--metrics=is,sfid"), "nothing is left to measure"),
        (("digits", good, "--features=sys:path"), "cannot be imported|is no function"),
        (("digits", good, "--features=test_judging:mesh_shape"), "is no function, but a tuple"),
        (("digits", tmp_path / "empty"), "no images below"),
        (("digits", good, "--metrics=fid,fad"), "'fad' is unknown; known: fid, sfid"),
        (("digits", good, "--batch_size=0"), "must be at least 1"),
        (("digits", good, "--features=vgg"), "features='vgg' is unknown"),
        (("digits", good, "--features=nothing:here"), "cannot be imported"),
        (("digits", good, "--features=inception"), "--inception=PATH is needed"),
        (("digits", good, "--inception=x.pth", "--features=inception"), "x.pth: no such file"),
        ((good, wider), "8x8 gray images and .*wider.npz 16x16 gray ones: .* not comparable; .*--image_size"),
        (("digits", good, "--output=bare.npy"), "bare.npy is a file; name a folder, or a file that ends in .json"),
        (("digits", good, "--output=bare.npy/place.json"), "bare.npy is a file"),
        ((good, good, "--features=digits", "--output=text.json"), "is not a valid metrics.json"),
        ((color, color, "--features=digits"), "gray images of 8x8 pixels, not 8x8x3; .*--channels=1"),
        ((wider, wider, "--features=digits"), "gray images of 8x8 pixels, not 16x16x1; .*--image_size=8"),
    ):
        assert re.search(words, refused(capsys, *arguments)), arguments


# ---- runs


OVERRIDES = {
    "sampling.steps": 2,
    "sampling.sampler": "ddim",
    "sampling.batch_size": 8,
    "evaluation.num_samples": 20,
    "evaluation.likelihood": False,
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    config, directory = tiny_config(**OVERRIDES), tmp_path_factory.mktemp("untrained") / "run"
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(2, training.setup(config).init())
        checkpoints.finish(2)
    workdir.write_config(config, directory)
    return directory


@pytest.fixture
def run(untrained, tmp_path):
    """An untrained run's work directory."""
    return pathlib.Path(shutil.copytree(untrained, tmp_path / "run"))


def test_evaluate_judges_samples(run, capsys, monkeypatch):
    evaluate(tiny_config(**OVERRIDES), run)
    (record,) = json.loads((run / "metrics.json").read_text())
    (path,) = (run / "samples").glob("*.npz")
    drawn = np.load(path)["arr_0"]
    moments = [metrics.moments(by_hand(x)) for x in (all_digits(), drawn)]
    assert record["frechet_distance"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-4)
    assert (record["weights"], record["step"], record["steps"], record["num_samples"]) == ("ema", 2, 2, 20)
    assert record["sampling"]["sampler"] == "ddim" and record["sampling"]["seed"] == 0
    assert record["sampling"]["use_ema"] is True
    assert "64 dimensions: the distance is larger" in capsys.readouterr().out
    monkeypatch.setattr(Generator, "__call__", None)  # nothing is drawn twice
    evaluate(tiny_config(**OVERRIDES), run)
    assert not list(run.glob("*steps.png"))
    monkeypatch.undo()
    evaluate(tiny_config(**OVERRIDES | {"sampling.steps": 4}), run)
    assert len(json.loads((run / "metrics.json").read_text())) == 2
    assert Image.open(run / "frechet_distance_against_steps.png").width > 100


DRAWN = OVERRIDES | {"sampling.num_samples": 20}


def reuse_or_draw(config, directory):
    """The samples as --mode=evaluate gets them."""
    file = SampleFile(config, directory)
    file.draw(reuse=True)
    return file


@pytest.fixture
def drawn(monkeypatch):
    """Seeds and numbers of the batches that are drawn, in place of a network's drawing."""
    calls = []

    def draw(self, params, seed, batch=0):
        calls.append((seed, batch))
        return np.full((self.batch_size, 8, 8, 1), 10 * seed + batch, np.uint8)

    monkeypatch.setattr(Generator, "__call__", draw)
    return calls


def store_settings(path, change):
    """Rewrites the settings beside the samples of a file; change(dict)."""
    with np.load(path) as arrays:
        stored, images = json.loads(str(arrays["settings"])), arrays["arr_0"]
    change(stored["settings"])
    np.savez(path, images, settings=np.array(json.dumps(stored)))


def test_samples_of_the_same_settings_are_reused(run, drawn, capsys):
    reuse_or_draw(tiny_config(**DRAWN), run)
    assert len(drawn) == 3
    for free in ({}, {"sampling.trajectory": 3, "sampling.progress": True, "sampling.preview_steps": 7}):
        reuse_or_draw(tiny_config(**DRAWN | free), run)
    assert len(drawn) == 3 and "Drawing anew" not in capsys.readouterr().out
    sample.run(tiny_config(**DRAWN), run)  # --mode=sample draws whatever is there
    assert len(drawn) == 6


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"sampling.batch_size": 2}, "batch_size=3, now 2"),
        ({"sampling.classifier_flags": "{}"}, "sampling.classifier_flags=, now {}"),
        ({"sampling.clip_quantile": 0.9}, "sampling.clip_quantile=0.995, now 0.9"),
        ({"model.convolution": "xla"}, "model.convolution=auto, now xla"),
    ],
)
def test_samples_of_other_settings_are_drawn_anew(run, drawn, capsys, overrides, told):
    """Though their files have one name."""
    config = {"sampling.batch_size": 3}
    one = reuse_or_draw(tiny_config(**config), run)
    before = len(drawn)
    other = reuse_or_draw(tiny_config(**config | overrides), run)
    assert other.path == one.path and len(drawn) > before
    assert f"Drawing anew: {one.path} was drawn with other settings ({told})." in capsys.readouterr().out
    assert read_settings(one.path)["settings"]["batch_size"] == other.batch_size
    sample.run(tiny_config(**config), run)  # --mode=sample, too
    assert f"Drawing anew: {one.path} was drawn with other settings" in capsys.readouterr().out


def test_samples_of_other_weights_or_devices_are_drawn_anew(run, drawn, capsys):
    config = tiny_config(**DRAWN)
    path = reuse_or_draw(config, run).path
    store_settings(path, lambda settings: settings.update(devices=64, classifier_digest="0" * 64))
    reuse_or_draw(config, run)
    assert len(drawn) == 6
    out = capsys.readouterr().out
    assert re.search(
        r"Drawing anew: .* other settings \(classifier_digest=00000000..., now None; devices=64, now \d+\)", out
    )
    # The same step of a run that was begun again with another seed.
    store_settings(path, lambda settings: settings.update(weights_digest="1" * 64))
    reuse_or_draw(config, run)
    assert len(drawn) == 9 and "weights_digest=" in capsys.readouterr().out


def test_what_a_spacing_stands_for_is_a_setting(run, drawn, capsys, monkeypatch):
    """The same config may stand for other times in another version."""
    reuse_or_draw(tiny_config(**DRAWN), run)
    respace = sampling_setup.respace
    other = {"steps": 2, "spacing": "leading"}
    monkeypatch.setattr(
        sampling_setup, "respace", lambda schedule, options, *more: respace(schedule, {**options, **other}, *more)
    )
    reuse_or_draw(tiny_config(**DRAWN), run)
    assert len(drawn) == 6 and "(times_digest=" in capsys.readouterr().out


def test_samples_that_do_not_say_how_they_were_drawn_are_drawn_anew(run, drawn, capsys):
    config = tiny_config(**DRAWN)
    path = reuse_or_draw(config, run).path
    for write in (
        lambda: np.savez(path, np.zeros((20, 8, 8, 1), np.uint8)),
        lambda: path.write_bytes(b"PK\x03\x04 torn"),
    ):
        write()
        reuse_or_draw(config, run)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Drawing anew")]
        assert "does not store the settings" in line and str(path) in line
        with np.load(path) as arrays:
            assert arrays["arr_0"].max() == 2
    assert len(drawn) == 9


def test_unfinished_samples_of_other_settings_are_not_gone_on_with(run, drawn, monkeypatch):
    draw, config = Generator.__call__, tiny_config(**DRAWN)

    def second_breaks(self, params, seed, batch=0):
        if batch == 2:
            raise KeyboardInterrupt
        return draw(self, params, seed, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Generator, "__call__", second_breaks)
        with pytest.raises(KeyboardInterrupt):
            sample.run(config, run)
    assert [batch for _, batch in drawn] == [0, 1]
    sample.run(tiny_config(**DRAWN | {"sampling.clip_quantile": 0.9}), run)
    assert [batch for _, batch in drawn] == [0, 1, 0, 1, 2]
    sample.run(tiny_config(**DRAWN), run)
    assert [batch for _, batch in drawn] == [0, 1, 0, 1, 2, 2]  # of the first command, one batch was left


def test_weights_are_told_apart_by_what_they_hold():
    tree = {"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.float32(3)}
    same = {"b": np.float32(3), "a": {"kernel": np.arange(6.0).reshape(2, 3)}}
    assert trained_model.params_digest(tree) == trained_model.params_digest(same)
    for other in (
        {**tree, "b": np.float32(4)},
        {**tree, "b": np.float64(3)},
        {"a": {"kernel": np.arange(6.0).reshape(3, 2)}, "b": np.float32(3)},
        {"a": {"scale": np.arange(6.0).reshape(2, 3)}, "b": np.float32(3)},
    ):
        assert trained_model.params_digest(other) != trained_model.params_digest(tree)


def test_a_record_is_of_the_settings_that_the_samples_were_drawn_with(run, drawn):
    config = tiny_config(**DRAWN)
    path = reuse_or_draw(tiny_config(**DRAWN), run).path
    with np.load(path) as arrays:
        stored, images = json.loads(str(arrays["settings"])), arrays["arr_0"]
    stored["drawn_with"] = {"jax": "0.0.1"}
    np.savez(path, images, settings=np.array(json.dumps(stored)))
    evaluate(tiny_config(**DRAWN, **{"evaluation.metrics": ("fid",)}), run)
    (record,) = json.loads((run / "metrics.json").read_text())
    assert record["drawn_with"] == {"jax": "0.0.1"} and record["sampling"]["batch_size"] == 8
    assert record["weights_digest"] == stored["settings"]["weights_digest"] and len(drawn) == 3
    assert record["sampling"]["sampler"] == config.sampling.sampler and "steps" not in record["sampling"]


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_weights_that_are_asked_for_are_judged(run, use_ema, monkeypatch):
    asked = []

    def sample_file(config, directory):
        asked.append((config.sampling.use_ema, config.sampling.num_samples))
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_metrics, "SampleFile", sample_file)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_config(**OVERRIDES | {"evaluation.use_ema": use_ema}), run)
    assert asked == [(use_ema, 20)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"evaluation.features": "inception"}, "metrics of samples need features: set evaluation.inception=PATH"),
        ({"evaluation.features": "inception", "evaluation.inception": "none.pth"}, "none.pth: no such file"),
        ({"evaluation.num_samples": 7}, "num_samples=7 is too few: these metrics need at least 8"),
        ({"evaluation.metrics": ("fad",)}, "'fad' is unknown"),
        ({"evaluation.resize": "nearest"}, "known: tf1, pytorch, clean"),
        ({"evaluation.every": -1}, "must be at least 0"),
        ({"evaluation.batch_size": 0}, "evaluation.batch_size=0 must be at least 1"),
    ],
)
def test_judging_that_cannot_be(run, overrides, words):
    with pytest.raises((UserError, PretrainedError), match=words):
        evaluate(tiny_config(**OVERRIDES | overrides), run)
    assert not (run / "samples").exists()


def test_training_logs_a_distance(tmp_path):
    config = tiny_config(**{"evaluation.every": 2, "evaluation.every_samples": 10, "sampling.preview_samples": 0})
    train.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["frechet_distance_10_ddim2"] for line in lines if "frechet_distance_10_ddim2" in line}
    assert list(logged) == [2, 4]
    # Of the EMA weights, as the same draws made here say.
    built = training.setup(config)
    _, params = trained_model.load_weights(config, tmp_path / "run", built.model, built.mesh, use_ema=True)
    generator = make_preview_sampler(config, built, config.sampling.batch_size)
    drawn = np.concatenate([generator(params, 0, i) for i in range(5)])
    moments = [metrics.moments(by_hand(x)) for x in (all_digits(), drawn)]
    assert logged[4] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-4)
    with pytest.raises(UserError, match="evaluation.every=2 must be a multiple of training.steps_per_call=4"):
        config = tiny_config(**{"evaluation.every": 2, "training.steps_per_call": 4, "training.log_every": 4})
        config.training.checkpoint_every = 4
        train.run(config, tmp_path / "other")


DEVICES = """
import jax, sys
from diffusion_jax.evaluation import __main__ as command, metrics
assert jax.device_count() == 8
command.main(["digits:train", "samples.npz", "--batch_size=20", "--output=eight.json"])
"""


def test_eight_devices_give_the_figures_of_one(tmp_path):
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


@pytest.mark.slow
def test_inception_s_figures_depend_neither_on_the_batch_size_nor_on_the_devices(port, tmp_path):
    """Three minutes: three times 300 images through the whole network."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (300, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    save(tmp_path / "reference.npz", smooth[:150])
    save(tmp_path / "samples.npz", np.clip(smooth[150:] * 0.8 + 20, 0, 255).astype(np.uint8))
    records = []
    for devices, batch_size in ((1, 64), (1, 22), (4, 64)):
        variables = dict(
            os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}", PYTHONPATH=str(ROOT)
        )
        variables["XDG_CACHE_HOME"] = str(tmp_path / f"{devices}_{batch_size}")
        arguments = ["reference.npz", "samples.npz", f"--inception={port}", f"--batch_size={batch_size}"]
        arguments += ["--metrics=fid,sfid,kid,precision_recall,density_coverage", f"--output={len(records)}.json"]
        program = [sys.executable, "-m", "diffusion_jax.evaluation", *arguments]
        subprocess.run(program, cwd=tmp_path, env=variables, check=True, capture_output=True)
        records += json.loads((tmp_path / f"{len(records)}.json").read_text())
    for other in records[1:]:
        for name in ("frechet_distance", "spatial_frechet_distance", "precision", "recall", "density", "coverage"):
            assert other[name] == pytest.approx(records[0][name], rel=1e-6), name
        within = 1e-6 * records[0]["kernel_distance_std"]
        assert other["kernel_distance"] == pytest.approx(records[0]["kernel_distance"], rel=1e-6, abs=within)
