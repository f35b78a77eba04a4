"""Sets of images and statistics, feature extraction in chunks, and the metrics that a set allows."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, metrics, pictures
from diffusion_jax.evaluation import compare, features
from diffusion_jax.files import user_cache
from diffusion_jax.metrics import METRICS, of_arrays, of_features
from helpers.digits_features import by_hand
from helpers.image_files import all_digits, save, single_mesh

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_digits_network_classifies_digits():
    source = data.Digits("test", (8, 8), 1)
    drawn, labels = source.read(np.arange(len(source))).values()
    params = {"params": features.digits().params}
    gray, color = (features.DigitsNetwork().apply(params, drawn.repeat(n, axis=3))[1] for n in (1, 3))
    assert (gray.argmax(-1) == labels).mean() > 0.98 and abs(gray - color).max() < 1e-4 * abs(gray).max()


@pytest.mark.parametrize("batch_size", [7, 64])
def test_features_do_not_depend_on_the_batch_size(batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 50)
    extraction = features.FeaturePipeline(features.digits(), single_mesh(), batch_size)
    source = features.open_set(save(tmp_path / "x.npz", all_digits()[:151]))
    found = extraction.extract_set(source)
    expected = by_hand(all_digits()[:151])
    np.testing.assert_allclose(found.pool, expected, atol=1e-5 * expected.max())
    assert found.moments.count == 151 and found.spatial is None
    np.testing.assert_allclose(found.moments.covariance, np.cov(expected, rowvar=False), atol=1e-5)


def test_features_of_many_images_are_of_a_subset(tmp_path, monkeypatch):
    """A folder has one class after another, so its first images are of few classes. Numbers are those of the examples."""
    monkeypatch.setattr(features, "CHUNK", 20)
    for module in (features, compare):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 30)
    shown = []
    monkeypatch.setattr(pictures, "draw_neighbors", lambda *arguments: shown.append(arguments) or np.zeros((8, 8, 1)))
    monkeypatch.setattr(pictures, "save", lambda *_: None)
    extraction = features.FeaturePipeline(features.digits(), single_mesh(), 20)
    one = features.open_set(save(tmp_path / "x.npz", all_digits()[:90]))
    other = features.open_set(save(tmp_path / "y.npz", all_digits()[:60][::-1]))
    np.testing.assert_allclose(
        extraction.extract_set(one).pool, by_hand(all_digits()[of_arrays.subset_indices(90, 30)]), rtol=1e-4, atol=1e-4
    )
    compare.compare(one, other, ["memorization"], tmp_path / "metrics.json", extraction, metrics.Options(), {})
    ((drawn, numbers, examples, distances, *_),) = shown
    copies = distances[:, 0] < 1e-3
    np.testing.assert_array_equal(drawn, all_digits()[:60][::-1][numbers])
    assert copies.any()
    np.testing.assert_array_equal(drawn[copies], examples[copies, 0])


def extractor_of(function):
    return features.FeatureExtractor("mine", "1", lambda _, x: {"pool": function(x)})


def test_an_interrupted_extraction_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 20)
    calls = []

    def judge_images(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch.reshape(len(batch), -1)[:, :5].astype(np.float32)

    extraction = features.FeaturePipeline(extractor_of(judge_images), single_mesh(), 20)
    source = features.open_set(save(tmp_path / "x.npz", all_digits()[:90]))
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_set(source)
    found = extraction.extract_set(source)
    assert len(calls) == 3 + 3 and len(found.pool) == 90  # two chunks were kept
    extraction.extract_set(source)
    assert len(calls) == 6  # all chunks now
    found.chunks.delete()
    assert not any((user_cache() / "features" / "references").iterdir())


def test_invalid_features_are_refused(tmp_path):
    for function, words in (
        (lambda x: np.zeros((len(x), 2, 2)), r"features of shape \(4, 2, 2\) for 4 images, not \[4, D\]"),
        (lambda x: np.zeros((1, 2)), r"features of shape \(1, 2\)"),
        (lambda x: np.full((len(x), 2), np.nan), "not finite"),
    ):
        extraction = features.FeaturePipeline(extractor_of(function), single_mesh(), 4)
        with pytest.raises(ValueError, match=words):
            extraction(all_digits()[:3])


def test_published_inception_has_all_metrics_and_others_have_fewer():
    published = features.FeatureExtractor("inception", "0", None, resize="tf1", published=True)
    moments = of_features.Moments(np.zeros(2), np.eye(2), 9)
    statistics = features.ExampleSet("x", None, features.SetFeatures(None, moments, None, "0"))
    images = features.ExampleSet("x", data.Digits("test", (8, 8), 1))
    without_images = ["sfid", "kid", "precision_recall", "density_coverage", "memorization"]
    names = [name for name in METRICS if metrics.needs_features([name], True)]
    assert [metrics.reported_name(name, True, "tf1") for name in ("fid", "sfid", "is")] == [
        "fid",
        "sfid",
        "inception_score",
    ]
    assert metrics.reported_name("fid", True, "clean") == "fid_clean"
    assert metrics.reported_name("fid", False, None) == "frechet_distance"
    for reference, extractor, missing in (
        (images, published, []),
        (statistics, published, without_images),
        (images, features.digits(), ["sfid", "is"]),
    ):
        assert [name for name in names if compare._why_not(METRICS[name].needs, reference, extractor)] == missing


def test_copies_of_the_reference_are_found():
    reference = np.random.default_rng(0).normal(size=(500, 8))
    fresh = np.random.default_rng(1).normal(size=(400, 8))
    report, _ = of_features.memorization_report(reference, fresh)
    assert report["close_share"] < 0.05
    fresh[:100] = reference[200:300] + 1e-3
    report, near = of_features.memorization_report(reference, fresh)
    assert 0.25 <= report["close_share"] < 0.3 and (near.indices[:100, 0] == np.arange(200, 300)).all()
    reference[10:20] = reference[:10]  # duplicates within the reference must not hide copies that are not exact
    assert of_features.memorization_report(reference, reference[:300] + 1e-3)[0]["close_share"] == 1


# ---- Sets in files


def test_a_folder_is_read_without_resizing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.testing.assert_array_equal(features.open_set(str(folder)).examples.read(np.arange(3))["image"], drawn)
    Image.fromarray(drawn[0, :5]).save(folder / "z.png")
    with pytest.raises(data.DataError, match="z.png is 9x5, but the first image is 9x6"):
        features.open_set(str(folder)).examples.read(np.arange(4))
    resized = features.open_set(str(folder), image_size=8).examples.read(np.arange(4))["image"]
    assert resized.shape == (4, 8, 8, 3)


def test_a_work_directory_stands_for_its_newest_samples(tmp_path):
    run = tmp_path / "run" / "samples"
    run.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a run without samples"):
        features.open_set(str(run.parent))
    (run / "edits").mkdir()
    for i, name in enumerate(("b.npz", "a.npz", "edits/inpaint.npz", "c.partial.npz")):
        save(run / name, all_digits()[:2])
        os.utime(run / name, (i, i))
    assert features.open_set(str(run.parent)).name == str(run / "a.npz")
