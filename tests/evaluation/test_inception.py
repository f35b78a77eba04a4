"""FID's Inception: weights, resizes and features."""

import hashlib

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation import features, inception
from diffusion_jax.pretrained import PretrainedError
from helpers import inception_peer
from helpers.image_files import single_mesh

pytestmark = pytest.mark.usefixtures("own_cache")


NAMES = {  # as the port's converter matched them
    "conv/conv2d_params": "Conv2d_1a_3x3.conv.weight",
    "mixed_2/tower/conv_1/batchnorm/moving_mean": "Mixed_5d.branch5x5_2.bn.running_mean",
    "mixed_6/tower_1/conv_4/batchnorm/moving_variance": "Mixed_6d.branch7x7dbl_5.bn.running_var",
    "mixed_8/tower_1/conv_3/conv2d_params": "Mixed_7a.branch7x7x3_4.conv.weight",
    "mixed_10/tower_1/mixed/conv/conv2d_params": "Mixed_7c.branch3x3dbl_3a.conv.weight",
    "mixed_10/tower_1/conv_1/conv2d_params": "Mixed_7c.branch3x3dbl_2.conv.weight",
    "softmax/weights": "fc.weight",
    "softmax/biases": "fc.bias",
}


@pytest.fixture(scope="module")
def redrawn():
    return inception_peer.redrawn()


@pytest.fixture(scope="module")
def port(redrawn, tmp_path_factory):
    """The same weights as a file with the port's names and layouts."""
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("port") / "inception.safetensors"
    save_file(inception_peer.as_port(redrawn), path)
    return path


@pytest.mark.thorough
def test_the_port_and_the_graph_have_the_same_weights(redrawn, port, tmp_path, monkeypatch):
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
    (ported, port_digest, port_published), (frozen, graph_digest, graph_published) = map(
        inception.load_inception, (port, path)
    )
    assert not graph_published and not port_published and graph_digest != port_digest
    monkeypatch.setattr(inception, "_PORT_SHA256", port_digest)
    monkeypatch.setattr(inception, "_GRAPH_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    assert inception.load_inception(port)[2] and inception.load_inception(path)[2]
    for params in (ported, frozen):
        found = flax.traverse_util.flatten_dict(params)
        assert found.keys() == redrawn.keys()
        for at, value in redrawn.items():
            np.testing.assert_array_equal(found[at], value)


@pytest.mark.thorough
def test_wrong_weight_files_are_refused(port, tmp_path):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(port) | {"fc.bias": np.full(1008, np.nan, np.float32)}, tmp_path / "nan.safetensors")
    (tmp_path / "torn.pb").write_bytes(b"\n\x90torn")
    for name, words in (
        ("nan.safetensors", "not finite"),
        ("torn.pb", "cannot be read as a TensorFlow graph"),
        ("none.pth", "no such file; .*6726825d"),
    ):
        with pytest.raises(PretrainedError, match=words):
            inception.load_inception(tmp_path / name)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(32, 32), (47, 33), (299, 299), (400, 301)])
def test_the_tf1_resize_equals_tensorflow(shape):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (2, *shape, 3)).astype(np.float32)
    theirs = tf.compat.v1.image.resize_bilinear(drawn, (299, 299), align_corners=False, half_pixel_centers=False)
    ours = np.asarray(inception.to_inception(drawn, "tf1")) * 128 + 128
    np.testing.assert_allclose(ours, theirs, atol=255 * 2**-22)  # two roundings of float32


def test_the_clean_resize_equals_pillow():
    """Large images are shrunk, too; there the clean resize differs from other resizes."""
    for shape in ((32, 32), (400, 301), (700, 650)):
        drawn = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.float32)
        channels = [Image.fromarray(drawn[..., i]).resize((299, 299), Image.Resampling.BICUBIC) for i in range(3)]
        theirs = np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 255)
        ours = np.asarray(inception.to_inception(drawn[None], "clean"))[0] * 128 + 128
        np.testing.assert_allclose(ours, theirs, atol=0.01)  # of 255; Pillow rounds between its two passes


@pytest.mark.thorough
def test_features_of_inception_equal_those_of_torch_fidelity(port):
    """The features equal torch-fidelity's for the same weights and images; a gray image equals a color image with equal
    channels."""
    extractor = features.inception(port)
    stored = np.load(inception_peer.FIXTURE)
    extraction = features.FeaturePipeline(extractor, single_mesh(), 2)
    found = extraction(stored["images"])
    for ours, theirs in (
        (found["pool"], stored["pool"]),
        (found["spatial"], stored["spatial"]),
        (found["pool"] @ extractor.head, stored["logits"]),
    ):
        assert theirs.std() > 1e-3 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    gray = stored["images"][..., :1]
    one, three = extraction(gray)["pool"], extraction(gray.repeat(3, axis=-1))["pool"]
    np.testing.assert_allclose(one, three, atol=1e-5 * three.max())  # two programs, as above
