"""Measures how fast a data set in a bucket is read file by file, in images per second, with a delay before every answer.

    python benchmarks/bucket_input.py --data_dir=DIR [--delay=0.05] [--workers=0,2] [--size=32] [--files=50]

DIR has CIFAR-10 of TFDS as array_record. The training images, enlarged to --size, are written as --files files into a server
that imitates Google Cloud Storage (the tests' emulator), behind a proxy that waits --delay seconds before every answer. Only
the reader runs, with the batches of the train step, without a network.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from PIL import Image


def write_files(source: pathlib.Path, target: pathlib.Path, size: int, count: int) -> float:
    """Writes CIFAR-10's training images as `count` array_record files; returns the mean bytes of an example."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module as module  # pyright: ignore[reportAttributeAccessIssue]

    features: Any = tfds.builder("cifar10", data_dir=str(source)).info.features
    enlarged: Any = tfds.features.FeaturesDict({**features, "image": tfds.features.Image(shape=(size, size, 3))})
    (original,) = (source / "cifar10" / "3.0.2").glob("cifar10-train.array_record*")
    target = target / "cifar10" / "3.0.2"
    target.mkdir(parents=True)
    records, total = module.ArrayRecordReader(str(original)).read_all(), 0
    for number, records_of_file in enumerate(np.array_split(np.arange(len(records)), count)):
        name = target / f"cifar10-train.array_record-{number:05d}-of-{count:05d}"
        writer = module.ArrayRecordWriter(str(name), "group_size:1")
        for index in records_of_file:
            record = records[index]
            if size != 32:
                example = features.deserialize_example_np(record)
                image = Image.fromarray(example["image"]).resize((size, size), Image.Resampling.BICUBIC)
                record = enlarged.serialize_example(enlarged.encode_example(example | {"image": np.asarray(image)}))
            writer.write(record)
            total += len(record)
        writer.close()
    text = (source / "cifar10" / "3.0.2" / "features.json").read_text().replace('"32"', f'"{size}"')
    (target / "features.json").write_text(text)
    info = json.loads((source / "cifar10" / "3.0.2" / "dataset_info.json").read_text())
    for split in info["splits"]:
        if split["name"] == "train":
            split["shardLengths"] = [str(len(part)) for part in np.array_split(np.arange(len(records)), count)]
    (target / "dataset_info.json").write_text(json.dumps(info))
    return total / len(records)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=128)
    options = parser.parse_args()

    from diffusion_jax import data
    from diffusion_jax.storage.objects import open_store
    from helpers.fault_proxy import FaultProxy  # pyright: ignore[reportMissingImports]  # in tests/
    from helpers.object_stores import gcs_emulator, make_bucket  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as directory, gcs_emulator() as address, FaultProxy(address) as proxy:
        os.environ |= {"STORAGE_EMULATOR_HOST": address, "XDG_CACHE_HOME": f"{directory}/cache"}
        bucket = make_bucket("gs", address)
        folder = pathlib.Path(directory) / "tfds"
        size = write_files(options.data_dir, folder, options.size, options.files)
        files = [path for path in folder.rglob("*") if path.is_file()]
        open_store(bucket).upload_all({str(path): f"tfds/{path.relative_to(folder).as_posix()}" for path in files})
        os.environ["STORAGE_EMULATOR_HOST"] = proxy.address
        proxy.inject("delay", seconds=options.delay, times=1e9)
        print(
            f"{options.size}x{options.size}, {size:,.0f} bytes per image, {options.delay * 1e3:.0f} ms before an answer"
        )
        config = {
            "dataset": "cifar10",
            "data_dir": f"{bucket}/tfds",
            "split": "train",
            "image_size": options.size,
            "channels": 3,
        }
        for workers in map(int, options.workers.split(",")):
            for name, data_dir in (("local files", str(folder)), ("bucket", f"{bucket}/tfds")):
                os.environ["XDG_CACHE_HOME"] = f"{directory}/cache_{workers}"
                source = data.load({**config, "data_dir": data_dir, "memory_mb": 0, "disk_mb": 0})
                requests, begin = len(proxy.requests), time.perf_counter()
                stream = data.stream(data.Batches(source, 0, options.batch_size, 10**6), workers=workers)
                next(stream)
                first, count = time.perf_counter() - begin, len(source) // options.batch_size
                for _ in range(count - 1):
                    next(stream)
                speed = count * options.batch_size / (time.perf_counter() - begin)
                stream.close()
                print(
                    f"{name}, {workers} workers: {speed:>8,.0f} images/s over an epoch, first batch after {first:.1f} s, "
                    f"{len(proxy.requests) - requests} requests",
                    flush=True,
                )


if __name__ == "__main__":
    main()
