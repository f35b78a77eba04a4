"""Files of strangers: they are read within limits, and every error is one line."""

import io
import json
import os
import pickle
import subprocess
import zipfile
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import DataError, UnreadableFilesError, UserError
from diffusion_jax.files import atomic_write, map_array, save_npz, write_text
from diffusion_jax.provenance import Provenance
from diffusion_jax.run_dir import RunDir, find_links, open_run_dir
from diffusion_jax.untrusted import open_npz, parse_json, read_image, read_json


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
        file.truncate(17 * 2**20)
    with pytest.raises(ValueError, match="the limit is 16,777,216"):
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


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_without_limits_is_refused(compression, tmp_path):
    """Python decompresses whatever a block holds at once."""
    write_member(tmp_path / "a.npz", {"descr": "<f4", "fortran_order": False, "shape": (1,)}, b"1234", compression)
    with pytest.raises(ValueError, match="compression"), open_npz(tmp_path / "a.npz"):
        pass


def test_a_large_record_is_not_read(tmp_path):
    large = np.zeros(2**22, np.uint8)  # other arrays have no limit
    np.savez(tmp_path / "a.npz", **Provenance("net", {"a": 1}).add_to({"arr_0": large}))
    record = Provenance.read(tmp_path / "a.npz")
    assert record is not None and (record.name, record.settings) == ("net", {"a": 1})
    assert record.describes(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", **Provenance("a" * 2**19, {}).add_to({}))
    assert Provenance.read(tmp_path / "b.npz") is None
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:  # NumPy prefers this name
        archive.writestr("provenance", b"not an array")
    assert Provenance.read(tmp_path / "a.npz") in (None, record)


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
        with pytest.raises(ValueError, match="not a PNG, JPEG, WebP or BMP image, or corrupted"):
            read_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match="64 pixels; the limit is 63"):
        read_image(tmp_path / "a.png", 63)


def test_a_picture_of_60000_by_60000_pixels_is_one_line(tmp_path):
    Image.new("1", (60_000, 60)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[20:24] = (60_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="3600000000 pixels"):
        read_image(tmp_path / "a.png")


def test_links_out_of_a_run(tmp_path):
    """Those deep in folders of other programs, such as W&B's links into its cache, are not the package's concern."""
    run = tmp_path / "run"
    for name in ("samples/deep", "wandb/run-1/logs", ".venv"):
        (run / name).mkdir(parents=True)
    (run / "inside").symlink_to(run / "samples")
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "run-1" / "logs" / "debug.log").symlink_to(tmp_path)
    (run / ".venv" / "python").symlink_to("/bin/sh")
    assert find_links(RunDir(run)) == []
    (run / "samples" / "deep" / "out").symlink_to(tmp_path)
    (run / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
    (run / "wandb" / "run-2").symlink_to(tmp_path)
    found = [run / "metrics.jsonl", run / "samples" / "deep" / "out", run / "wandb" / "run-2"]
    assert find_links(RunDir(run)) == found
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "link").symlink_to(tmp_path)
    for name in ("calibration", "evaluation", "mlruns", "other"):
        (run / name).symlink_to(tmp_path / "outside")
    (run / "hop").symlink_to(run / "other")
    top = [run / name for name in ("calibration", "evaluation", "hop", "mlruns", "other")]
    assert find_links(RunDir(run)) == sorted([*found, *top])


@pytest.mark.parametrize("name", ["checkpoints/5.partial", "report.html", ".lock", "metrics.jsonl"])
def test_pipes_in_a_run_are_refused_before_it_is_changed(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is a pipe, .*type: rm "):
        open_run_dir(tmp_path)
    assert open_run_dir(tmp_path, read_only=True).path == tmp_path


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["hard link", "regular file"])
def test_files_that_cannot_be_changed_alone_are_refused(name, kind, tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    if kind == "hard link":
        victim.write_text('{"step": 1}\n')
        os.link(victim, run / name)
        (run / "config.json").hardlink_to(victim)  # it is replaced
    else:
        (run / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is (not )?a {kind}") as error:
        open_run_dir(run)
    subprocess.run(str(error.value).rpartition("type: ")[2], shell=True, check=True)
    open_run_dir(run)
    if kind == "hard link":
        (run / name).write_text("own")
        assert victim.read_text() == '{"step": 1}\n'


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
        with pytest.raises(DataError, match="'x' is in another file, which is not opened"):
            data.ArrayFiles(str(path))
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["values"] = x
        file["x"] = h5py.SoftLink("/values")
    assert len(data.ArrayFiles(str(tmp_path / "own.h5"))) == 4


def test_zarr_unpickles_nothing(tmp_path):
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
    with pytest.raises(DataError, match=r"cannot read .*a.npz: Bad CRC-32 for file 'x.npy'"):
        data.ArrayFiles(str(path))
    monkeypatch.setattr("diffusion_jax.data.array_files._CHECKED_BYTES", 1000)
    notes = data.ArrayFiles(str(path)).notes()
    assert notes == [f"The checksums of {path} are not checked, because it is large; type: python -m zipfile -t {path}"]


LEGACY = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
LEGACY |= {"proto_cls": "tensorflow_datasets.FeaturesDict"}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("evil_data", {"pythonClassName": "evil.Feature"}),
        ("EvilData", {"pythonClassName": "evil.Feature"}),
        ("evil_data", LEGACY | {"content": json.dumps({"features": {"a": {"pythonClassName": "evil.Feature"}}})}),
    ],
)
def test_types_of_features_import_no_module(tmp_path, monkeypatch, name, features):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder, hidden = tmp_path / "evil_data" / "1.0.0", tmp_path / "hidden"
    hidden.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(hidden)
    info = {"name": "evil_data", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(DataError, match="features.json names the type evil.Feature, whose module would be imported"):
        data.load({"dataset": name, "data_dir": str(tmp_path), "download": False})
    assert not (tmp_path / "executed").exists()


def test_a_picture_with_damaged_exif_is_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0garbage that is not TIFF")
    with pytest.raises(ValueError, match="TIFF"):
        read_image(tmp_path / "a.png", upright=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(UnreadableFilesError, match="a.png"):
        data.load({"dataset": "folder", "data_dir": str(tmp_path), "image_size": 8, "channels": 3})


def test_data_in_a_pipe_is_not_read(tmp_path):
    for name in ("a.npy", "a.npz", "a.h5"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="is not a regular file"):
            data.ArrayFiles(str(tmp_path / name))


def test_headers_that_numpy_cannot_parse_are_one_line(tmp_path):
    headers = (b"{'descr': '<f4', 'shape': (", b"[" * 300, b"\0" * 8)
    for header in (*headers, b"{'descr': [], 'fortran_order': False, 'shape': (1,)}"):
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x.npy", content)
        with pytest.raises(ValueError), open_npz(tmp_path / "a.npz"):
            pass
    write_member(tmp_path / "a.npz", {"descr": "<U0", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(ValueError, match="objects"), open_npz(tmp_path / "a.npz"):
        pass
