"""Trains on a memory-mapped 6 GB file; measures anonymous memory, the time that steps wait for data, and the reader's rate.

    python benchmarks/large_arrays.py --directory=DIR [--gigabytes=6] [--minutes=12]

The file is a sparse .npy of fields with 256 x 256 x 5 floats; every 16th field holds noise. A small U-Net trains on the file
with `data.workers` readers. Every second, the script reads the memory of the run and its readers from /proc: RssAnon, which
excludes the pages of the file. The script prints the mean for each quarter of the run, the share of a step's time spent
waiting for data, and the readers' rate alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

SHAPE = (256, 256, 5)
WORKERS, BATCH = 1, 4

CONFIG = """
from diffusion_jax.config import default

def get_config():
    config = default()
    config.data.update(dataset="arrays", data_dir={file!r}, image_size=(256, 256), channels=5, levels=None)
    config.data.update(random_flip=False, normalization="none", memory_mb=512, workers={workers})
    config.model.update(channels=8, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, attention_levels=())
    config.model.update(num_groups=4, dropout=0.0)
    config.training.update(num_steps=100000, batch_size={batch}, log_every=20, sample_every=0, checkpoint_every=100000)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=100)
    return config
"""


def write_file(path: pathlib.Path, gigabytes: float) -> int:
    """Writes a sparse .npy; returns the number of examples."""
    bytes_per_example = int(np.prod(SHAPE)) * 4
    count = int(gigabytes * 1e9 / bytes_per_example)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, *SHAPE))
    rng = np.random.default_rng(0)
    for i in range(0, count, 16):
        array[i] = rng.standard_normal(SHAPE, np.float32)
    array.flush()
    return count


def children(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def anonymous_megabytes(pid: int) -> float:
    """Returns RssAnon of a process."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(process: subprocess.Popen, metrics: pathlib.Path, seconds: float) -> list[dict[int, float]]:
    """Records the memory of each process every second, until `seconds` after the first metrics."""
    records: list[dict[int, float]] = []
    end = None
    while process.poll() is None and (end is None or time.monotonic() < end):
        time.sleep(1)
        if end is None:
            end = time.monotonic() + seconds if metrics.exists() and metrics.stat().st_size else None
            continue
        record = {}
        for pid in children(process.pid):
            try:
                record[pid] = anonymous_megabytes(pid)
            except OSError:  # the process has ended
                continue
        records.append(record)
    return records


def reader_rate(file: pathlib.Path, seconds: float = 10) -> float:
    """Returns the examples per second that one process reads and normalizes in random order."""
    from diffusion_jax import data

    shape = {"image_size": SHAPE[:2], "channels": SHAPE[2], "levels": None, "random_flip": False, "memory_mb": 0}
    source = data.Normalized(data.load({"dataset": "arrays", "data_dir": str(file), **shape}), {})
    batches = data.Batches(source, 0, 32, 10**6)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(batches[count]["x"]) and 1
    return 32 * count / (time.perf_counter() - start)


def main() -> None:
    """Writes the file, trains, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--minutes", type=float, default=12.0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    file, run = options.directory / "fields.npy", options.directory / "run"
    count = write_file(file, options.gigabytes)
    print(f"{file}: {count:,} examples, {file.stat().st_size / 1e9:.2f} GB", flush=True)
    print(f"one reader: {reader_rate(file):,.0f} examples/s", flush=True)
    config = options.directory / "config.py"
    config.write_text(CONFIG.format(file=str(file), workers=WORKERS, batch=BATCH))
    main_py = pathlib.Path(__file__).resolve().parents[1] / "main.py"
    with (options.directory / "log.txt").open("w") as log:
        command = [sys.executable, str(main_py), f"--config={config}", f"--workdir={run}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        records = watch(process, run / "metrics.jsonl", 60 * options.minutes)
        process.terminate()
        process.wait()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    steady = set(records[-1]) if records else set()
    for pid in sorted(steady):
        values = np.array([record[pid] for record in records if pid in record])
        quarters = [f"{quarter.mean():.1f}" for quarter in np.array_split(values, 4)]
        change = 100 * (np.array_split(values, 4)[3].mean() / np.array_split(values, 4)[1].mean() - 1)
        print(f"process {pid}: RssAnon in MB by quarter {', '.join(quarters)}; last against second {change:+.2f}%")
    waits = [line["data_wait"] for line in lines]
    speed = np.mean([line["images_per_second"] for line in lines])
    print(f"{lines[-1]['step']} steps of {BATCH}: {speed:.2f} examples/s")
    print(f"fraction of a step that waits for data: mean {np.mean(waits):.4f}, largest {max(waits):.4f}")


if __name__ == "__main__":
    main()
