"""Measures the time and memory to load published networks, with random weights in the format of each family.

    python benchmarks/loading.py [--presets=ddpm_cifar10,adm_imagenet256]

Each network is written to a temporary file and loaded once in a separate process, with the file in the page cache. Memory is
the process's peak minus its memory after the imports, divided by the size of the float32 parameters.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

_CHILD = """
import resource, sys, time
from diffusion_jax import pretrained
import jax, jax.numpy as jnp, safetensors
jnp.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
net = pretrained.load(sys.argv[1], sys.argv[2] or None)
jax.block_until_ready(net.params)
print(time.perf_counter() - start, peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(net.params)))
"""


def write(name: str, directory: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Writes random tensors for a preset. Returns: (file or folder, flags for loading)."""
    from safetensors.numpy import save_file

    from diffusion_jax import models
    from diffusion_jax.pretrained import diffusers, ho, openai, parameters
    from diffusion_jax.pretrained.model import make_model

    model, rng = models.preset(name), np.random.default_rng(0)
    if name in ho.PRESETS:
        size, diffusion = ho.PRESETS[name]
        description = make_model("", model, size, diffusion)
        folder = directory / name
        (folder / "unet").mkdir(parents=True)
        unet, scheduler = diffusers.unet_to_config(description), diffusers.scheduler_to_config(description)
        (folder / "unet" / "config.json").write_text(json.dumps(unet))
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
        naming, path, flags = diffusers.NAMING, folder / "unet" / "diffusion_pytorch_model.safetensors", ""
    else:
        size, low, diffusion = openai.PRESETS[name]
        description = make_model("", model, size, diffusion, low_resolution=low)
        naming, folder, flags = openai.NAMING, None, name
        path = directory / f"{name}.safetensors"
    tensors = {}
    for path_in_tree, shape in parameters.parameter_shapes(model, description.example_shape).items():
        value = rng.standard_normal(shape, np.float32)
        tensors[naming(path_in_tree, model)] = parameters.to_torch(value, path_in_tree)
    if naming is openai.NAMING:
        for query in [tensor_name for tensor_name in tensors if ".q." in tensor_name]:
            joined = np.concatenate([tensors.pop(query.replace(".q.", f".{layer}.")) for layer in "qkv"])
            tensors[query.replace(".q.", ".qkv.")] = joined[..., None] if joined.ndim == 2 else joined
    save_file(tensors, path)
    return folder or path, flags


def main() -> None:
    """Prints a line of a table for each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="ddpm_cifar10,adm_imagenet256")
    print("| preset | parameters | seconds | peak memory / size of the parameters |\n|---|---|---|---|")
    for name in parser.parse_args().presets.split(","):
        with tempfile.TemporaryDirectory() as directory:
            path, flags = write(name, pathlib.Path(directory))
            command = [sys.executable, "-c", _CHILD, str(path), flags]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        seconds, peak, size = map(float, out.split())
        print(f"| {name} | {size / 4:,.0f} | {seconds:.2f} | {peak / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
