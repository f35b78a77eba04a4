"""Measures the CIFAR-10 reader in images per second: decoding into memory, from memory, and with worker processes.

    python benchmarks/input_pipeline.py --data_dir=DIR [--batch_size=128] [--workers=0,1,2]

Only the reader runs, with the batches of the train step, without a network.
"""

import argparse
import time

from diffusion_jax import data


def rate(source, batch_size: int, workers: int, seconds: float) -> float:
    """Returns images per second during `seconds`, after the first batch."""
    stream = data.stream(data.Batches(source, 0, batch_size, 10**6), workers=workers)
    next(stream)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        batches += 1
    return batches * batch_size / (time.perf_counter() - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    config = {"dataset": "cifar10", "data_dir": options.data_dir, "split": "train", "image_size": 32, "channels": 3}

    start = time.perf_counter()
    memory = data.load({**config, "memory_mb": 2048})
    seconds = time.perf_counter() - start
    print(f"decoding:     {len(memory) / seconds:>10,.0f} images/s ({seconds:.1f} s)")
    print(f"from memory:  {rate(memory, options.batch_size, 0, options.seconds):>10,.0f} images/s")
    streamed = data.load({**config, "memory_mb": 0})
    for workers in map(int, options.workers.split(",")):
        speed = rate(streamed, options.batch_size, workers, options.seconds)
        print(f"streamed, {workers} worker{'s' * (workers != 1)}: {speed:>8,.0f} images/s")


if __name__ == "__main__":
    main()
