"""Files of strangers: they are read within limits, and every error is one line."""

import io
import json
import os
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import DataError
from diffusion_jax.files import atomic_write, map_array, save_npz, write_text
from diffusion_jax.untrusted import find_links, open_npz, parse_json, read_image, read_json


def test_a_write_does_not_follow_links(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("report.html", "report.partial.html"):
        (run / name).symlink_to(victim)
    write_text(run / "report.html", "page")
    assert victim.read_text() == "kept" and (run / "report.html").read_text() == "page"
    assert not (run / "report.html").is_symlink() and (run / "report.partial.html").is_symlink()


def test_an_interrupted_write_leaves_nothing_for_long(tmp_path):
    path = tmp_path / "a[1].npz"
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    for name, age in (("a[1].partial.0123.npz", 7200), ("a[1].partial.4567.npz", 60), ("b.partial.0123.npz", 7200)):
        (tmp_path / name).write_bytes(b"of a killed program")
        os.utime(tmp_path / name, (os.stat(tmp_path).st_mtime - age,) * 2)
    save_npz(path, {"x": np.arange(3)})
    names = {"a[1].npz", "a[1].partial.4567.npz", "b.partial.0123.npz"}
    assert {each.name for each in tmp_path.iterdir()} == names


def test_a_directory_that_is_renamed_during_a_write_keeps_the_file(tmp_path):
    (tmp_path / "old").mkdir()
    with atomic_write(tmp_path / "old" / "a.txt") as file:
        file.write(b"whole")
        (tmp_path / "old").rename(tmp_path / "new")
    assert (tmp_path / "new" / "a.txt").read_text() == "whole" and not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("[1]", "not a JSON object"),
        ('{"a": ', "Expecting value"),
        ("\ud800", "Expecting value"),
    ],
)
def test_hostile_json_is_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_pipes_and_long_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, read_image, lambda path: open_npz(path).__enter__(), lambda path: map_array(path, "x")):
        with pytest.raises(ValueError, match="pipe is not a regular file"):
            read(tmp_path / "pipe")
    with open(tmp_path / "long.json", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="the limit is 67,108,864"):
        read_json(tmp_path / "long.json")


def write_member(path, header, content=b"", compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", buffer.getvalue() + content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_larger_than_their_file_are_refused(tmp_path, compression):
    path = tmp_path / "a.npz"
    for shape, dtype, words in (
        ((10**7, 10**6), "<f4", "does not fit"),
        ((-1, 4), "<f4", "does not fit|negative"),
        ((4,), "|O", "Python objects"),
    ):
        write_member(path, {"descr": dtype, "fortran_order": False, "shape": shape}, b"1234", compression)
        with pytest.raises(ValueError, match=words), open_npz(path) as arrays:
            arrays["x"]
        with pytest.raises(ValueError, match=words):
            map_array(path, "x")
    np.savez_compressed(path, x=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"its arrays have 8,000,128 bytes; the limit is 1,000"):
        with open_npz(path, 1000):
            pass


def test_a_damaged_npz_is_one_line(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 97):
        changed = bytes([*content[:position], content[position] ^ 255, *content[position + 1 :]])
        path.write_bytes(changed)
        try:
            with open_npz(path) as arrays:
                np.testing.assert_array_equal(arrays["x"], np.arange(1000.0))
        except ValueError as error:
            assert "\n" not in str(error)


def test_only_named_formats_are_decoded(tmp_path):
    image = Image.fromarray(np.full((8, 8, 3), 9, np.uint8))
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.bmp", "BMP")):
        image.save(tmp_path / name, kind)
        assert read_image(tmp_path / name).size == (8, 8)
    for kind in ("EPS", "TIFF", "GIF", "PPM"):  # EPS would start Ghostscript
        image.save(tmp_path / "b.png", kind)
        with pytest.raises(ValueError, match="not an image, or corrupted"):
            read_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match="64 pixels; the limit is 63"):
        read_image(tmp_path / "a.png", 63)


def test_a_picture_of_60000_by_60000_pixels_is_one_line(tmp_path):
    Image.new("1", (60_000, 60)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[20:24] = (60_000).to_bytes(4, "big")
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="3600000000 pixels"):
        read_image(tmp_path / "a.png")


def test_links_out_of_a_directory(tmp_path):
    run = tmp_path / "run"
    (run / "samples" / "deep").mkdir(parents=True)
    (run / "inside").symlink_to(run / "samples")
    assert find_links(run) == []
    (run / "samples" / "deep" / "out").symlink_to(tmp_path)
    (run / "gone").symlink_to(tmp_path / "nowhere")
    assert find_links(run) == [run / "gone", run / "samples" / "deep" / "out"]


# ---- Data


def test_links_in_folders_of_images_and_arrays_are_skipped(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    np.save(tmp_path / "private.npy", np.zeros((2, 3)))
    for kind, write in (("png", Image.new("RGB", (8, 8)).save), ("npy", lambda path: np.save(path, np.zeros((2, 3))))):
        folder = tmp_path / kind
        folder.mkdir()
        link = folder / f"link.{kind}"
        link.symlink_to(tmp_path / f"private.{kind}")
        make = (lambda folder: data.Folder(str(folder), (8, 8), 3)) if kind == "png" else (
            lambda folder: data.ArrayFiles(str(folder), shape=(3,))
        )  # fmt: skip
        with pytest.raises(DataError, match="Skipped 1 links out of the folder"):
            make(folder)
        write(folder / f"own.{kind}")
        source = make(folder)
        assert len(source) == (1 if kind == "png" else 2)
        assert source.notes() == ["Skipped 1 links out of the folder; copy the files to use them."]


def test_hdf5_reads_no_other_file(tmp_path):
    x = np.zeros((4, 3), np.float32)
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["x"] = x
    (tmp_path / "private.bin").write_bytes(x.tobytes())

    def linked(file):
        file["x"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "x")

    def through_a_group(file):
        file["others"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "/")
        file["x"] = h5py.SoftLink("/others/x")

    def external(file):
        file.create_dataset("x", x.shape, x.dtype, external=[(str(tmp_path / "private.bin"), 0, x.nbytes)])

    def virtual(file):
        layout = h5py.VirtualLayout(x.shape, x.dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "private.h5"), "x", x.shape)
        file.create_virtual_dataset("x", layout)

    for write in (linked, through_a_group, external, virtual):
        path = tmp_path / f"{write.__name__}.h5"
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(DataError, match="'(x|others)' is in another file, which is not opened"):
            data.ArrayFiles(str(path))
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["values"] = x
        file["x"] = h5py.SoftLink("/values")
    assert len(data.ArrayFiles(str(tmp_path / "own.h5"))) == 4


def test_zarr_unpickles_nothing(tmp_path):
    import pickle

    array = tmp_path / "a.zarr" / "x"
    array.mkdir(parents=True)
    (tmp_path / "a.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    meta = {"zarr_format": 2, "shape": [4, 3], "chunks": [4, 3], "dtype": "|O", "fill_value": None, "order": "C"}
    (array / ".zarray").write_text(
        json.dumps(meta | {"compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]})
    )
    (array / "0.0").write_bytes(pickle.dumps(Touch(str(tmp_path / "touched"))))
    with pytest.raises(DataError, match="x is .*, not numbers|cannot read"):
        data.ArrayFiles(str(tmp_path / "a.zarr")).read([0])
    assert not (tmp_path / "touched").exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_flipped_byte_of_an_uncompressed_npz_is_found(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((10_000, 3)))
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.npz is corrupted: the checksum of x.npy differs"):
        data.ArrayFiles(str(path))
    monkeypatch.setattr("diffusion_jax.data.array_files._CHECKED_BYTES", 1000)
    notes = data.ArrayFiles(str(path)).notes()
    assert notes == [
        f"The checksums of {path} are not checked, because it is large; python -m zipfile -t {path} checks them."
    ]


@pytest.mark.parametrize(
    "content", ['{"pythonClassName": "evil.Feature"}', '{"a": [{"type": "evil.x.Feature"}]}', "[1]"]
)
def test_types_of_features_import_no_module(tmp_path, content):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(content)
    config = {"dataset": "cifar10", "data_dir": str(tmp_path), "download": False}
    with pytest.raises(DataError, match="names the type evil.*, whose module|cannot be read: it is not a JSON object"):
        data.load(config)
