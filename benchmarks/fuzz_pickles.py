"""Changes bytes and operations of small files of PyTorch and EDM, many times, and reads the files.

    python benchmarks/fuzz_pickles.py [--count=2000 --seed=0]

A case is a file of `torch.save` (current or older format), a plain pickle, or a pickle of EDM, with one to four changes. The
case passes if all tensors of the file are read (and EDM's network described), or the error is a PretrainedError or ValueError
of one line, within 20 seconds, and if the process's peak memory grows by less than 2 GB. The summary goes into
docs/results/reliability.md; failures are listed with their seeds, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import faulthandler
import io
import pathlib
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SECONDS, GIGABYTES = 20.0, 2.0
BEGIN, END = "<!-- fuzz_pickles: begin -->", "<!-- fuzz_pickles: end -->"
OPERATIONS = [  # inserted between two operations of a pickle
    *(bytes([code]) for code in b"012()]}tlduaesbRQN\x81\x85\x86\x87\x8f\x90\x91\x93\x94"),
    *(b"h" + bytes([place]) for place in range(12)),
    *(b"q" + bytes([place]) for place in range(12)),
    b"r\xff\xff\xff\xff",
    b"p99999999999999999999999999\n",
    b"\x8a\x0a" + bytes(9) + b"\x40",  # a number of 2^78
    b"J\xff\xff\xff\x7f",
    b"K\x00",
    b"X\x01\x00\x00\x00a",
    *(code + struct.pack("<Q", 2**power) for code in (b"\x8d", b"\x8e", b"\x95", b"\x96") for power in (34, 62)),
    b"c__builtin__\nset\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ctorch\nSize\n",
    b"c_codecs\nencode\n",
]


def make_files() -> dict[str, bytes]:
    """Returns files by kind."""
    from helpers import torch_files
    from helpers.edm_networks import ADM

    arrays = {"a.weight": np.ones((3, 4), np.float32), "a.bias": np.ones(3, np.float16), "n": np.array(7)}
    weights = {"model.map_layer0.weight": arrays["a.weight"], "model.enc.8x8_conv.bias": arrays["a.bias"]}
    state, files = torch_files.tensors(arrays), {}
    files["archive"] = torch_files.archive_bytes({"state_dict": state, "epoch": 3})
    files["older format"] = torch_files.legacy_bytes(state)
    for protocol in (2, 4):
        files[f"plain, protocol {protocol}"] = torch_files.dumps(state, protocol)
        files[f"EDM, protocol {protocol}"] = torch_files.edm_pickle("EDMPrecond", weights, ADM, "marker", protocol)
    return files


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Replaces, removes, repeats or inserts bytes."""
    start = draw.randrange(len(content))
    end = start + draw.choice([1, 1, 2, 8, 100])
    middle = content[start:end]
    new = draw.choice([draw.randbytes(len(middle)), b"", middle * 2, middle * 1000, draw.randbytes(4) + middle])
    return content[:start] + new + content[end:]


def change_operations(content: bytes, draw: random.Random) -> bytes:
    """Inserts, removes or repeats operations of the first pickles in `content`."""
    file, starts = io.BytesIO(content), [0]
    try:
        while True:
            starts.extend(place for *_, place in pickletools.genops(file) if place is not None)
    except (ValueError, struct.error):  # the numbers after the last pickle, or an earlier change
        pass
    first, last = sorted(draw.choices(starts, k=2))
    count = draw.choice([1, 1, 2, 60, 10_000])
    new = draw.choice(OPERATIONS) + (draw.choice(OPERATIONS) if draw.random() < 0.5 else b"")
    if draw.random() < 0.6:
        return content[:first] + new * count + content[first:]
    return content[:first] + content[first:last][:2000] * draw.choice([0, 2, 100]) + content[last:]


def change_member(content: bytes, draw: random.Random) -> bytes:
    """Changes the operations of the pickle in an archive."""
    file, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            value = source.read(name)
            archive.writestr(name, change_operations(value, draw) if name.endswith("data.pkl") else value)
    return file.getvalue()


def change(kind: str, content: bytes, draw: random.Random) -> bytes:
    """Makes one to four changes."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        change_pickle: Callable = change_operations
        if kind == "archive":
            change_pickle = change_member if zipfile.is_zipfile(io.BytesIO(content)) else change_bytes
        try:
            content = draw.choice([change_bytes, change_pickle, change_pickle])(content, draw)
        except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError, EOFError, OSError, KeyError):
            content = change_bytes(content, draw)  # an earlier change broke the archive
        content = content or pickle.dumps({})
    return content


def read(path: pathlib.Path) -> str:
    """Reads all tensors. Returns: "value", "error", or the description of another exception."""
    from diffusion_jax import pretrained
    from diffusion_jax.pretrained import PretrainedError, edm, parameters

    try:
        tensors = parameters.open_tensors(path)
        for name in list(tensors.shapes):
            tensors.read(name)
        if edm.is_edm(tensors):
            pretrained.describe(path)
        return "value"
    except (PretrainedError, ValueError) as error:
        return "error" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def write_report(page: pathlib.Path, row: str) -> None:
    """Adds a row to the table between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = [line for line in old.splitlines() if line.startswith("| 2")]
    head = "| date, commit, seed | cases | all tensors read | an error of one line | failed | slowest | memory |"
    page.write_text("\n".join([before + BEGIN, head, "|---|---|---|---|---|---|---|", *kept, row, "", END]) + after)


def main() -> None:
    """Runs the cases, prints the failures, and writes the report."""
    from benchmarks.mutants import commit_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=pathlib.Path, default=ROOT / "docs" / "results" / "reliability.md")
    options = parser.parse_args()
    files, counts, failures = make_files(), collections.Counter[str](), list[str]()
    slowest = peak = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary) / "file"
        for kind, content in files.items():
            path.write_bytes(content)
            if read(path) != "value":
                raise SystemExit(f"error: the unchanged file cannot be read: {kind}")
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(options.count):
            seed = options.seed * 1_000_000 + i
            draw, kind = random.Random(seed), list(files)[i % len(files)]
            path.write_bytes(change(kind, files[kind], draw))
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a case without an end stops the measurement
            begin = time.monotonic()
            result = read(path)
            seconds = time.monotonic() - begin
            faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, seconds)
            peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1e6
            if result not in ("value", "error") or seconds > SECONDS or peak > GIGABYTES:
                failures.append(f"seed {seed}, {kind}: {result[:200]}, {seconds:.1f} s, {peak:.2f} GB")
                print(failures[-1], flush=True)
            else:
                counts[result] += 1
    cells = [f"{datetime.date.today()}, {commit_of(ROOT)}, {options.seed}", options.count, counts["value"]]
    cells += [counts["error"], len(failures), f"{slowest:.1f} s", f"{peak:.2f} GB"]
    row = " | ".join(map(str, ["", *cells, ""])).strip()
    write_report(options.report, row)
    print(row)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
