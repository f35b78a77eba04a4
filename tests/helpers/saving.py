"""A process that saves and restores checkpoints together with other processes: `python -m helpers.saving SCENARIO PORT COUNT
INDEX ...`.

The state has a run's tree, with split and replicated arrays, and random values, so nothing is compiled.
"""

import contextlib
import errno
import json
import pathlib
import sys
import time
from unittest import mock

import jax
import numpy as np
import optax

from diffusion_jax.distributed import devices, sharding
from diffusion_jax.errors import SaveError
from diffusion_jax.training import checkpoints
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.state import TrainState


def abstract_state(fsdp: int) -> TrainState:
    """Shapes on the mesh of all devices."""
    mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp})

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, np.float32)

    params = {"dense": {"kernel": shape(128, 256), "bias": shape(8)}, "conv": shape(3, 3, 64, 64)}
    optimizer = jax.eval_shape(optax.adam(1e-3).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, params, optimizer, {"count": shape()})
    shardings = sharding.state_sharding(mesh, state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def values(abstract: TrainState, seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), abstract)


def random_state(abstract: TrainState, seed: int) -> TrainState:
    def place(leaf, value):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree.map(place, abstract, values(abstract, seed))


def assert_holds(state: TrainState, abstract: TrainState, seed: int) -> None:
    """Compares every shard of this process, to the bit."""

    def compare(leaf, shape, value):
        assert leaf.sharding == shape.sharding
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])

    jax.tree.map(compare, state, abstract, values(abstract, seed))


def exchange(directory: pathlib.Path, *meshes: str) -> dict:
    """Saves two steps on each mesh (values of fsdp), and restores the second step on all meshes."""
    for fsdp in map(int, meshes):
        with Checkpoints(directory / str(fsdp), kept=1) as saved:
            for step in (1, 2):
                saved.save(step, random_state(abstract_state(fsdp), seed=10 * fsdp + step))
                saved.check()
            saved.finish()
    return restore(directory, *meshes)


def restore(directory: pathlib.Path, *meshes: str) -> dict:
    """Restores all checkpoints in `directory`, which `exchange` has saved, on each mesh."""
    found = sorted(path for path in directory.iterdir() if path.name.isdecimal())
    for path in found:
        for abstract in (abstract_state(fsdp) for fsdp in map(int, meshes)):
            with Checkpoints(path, read_only=True) as saved:
                assert_holds(saved.restore(abstract), abstract, seed=10 * int(path.name) + 2)
    return {"restored": [path.name for path in found]}


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(process: int, module, name: str):
    """A context in which a function on one process finds a full disk."""
    is_broken = jax.process_index() == process
    return mock.patch.object(module, name, full) if is_broken else contextlib.nullcontext()


def fail(directory: pathlib.Path) -> dict:
    """Runs saves that fail on one process, then a successful save; returns each process's errors and results."""
    state, errors, num_checks = random_state(abstract_state(jax.device_count()), seed=0), [], 0
    with Checkpoints(directory) as saved:
        saved.save(1, state)
        saved.finish()
        for step, broken in ((2, (1, checkpoints, "write_part")), (3, (0, checkpoints, "write_manifest"))):
            with full_disk(*broken):
                saved.save(step, state)
                try:
                    saved.finish()
                except SaveError as error:
                    errors.append(str(error))
        with full_disk(1, checkpoints, "write_part"):
            saved.save(4, state)
            try:
                while True:  # as the train loop does, at another speed on each process
                    saved.check()
                    num_checks += 1
                    time.sleep(0.02 + 0.05 * jax.process_index())
            except SaveError as error:
                errors.append(str(error))
        saved.save(5, state)
        saved.finish()
    return {"errors": errors, "num_checks": num_checks, "left": sorted(path.name for path in directory.iterdir())}


if __name__ == "__main__":
    scenario, port, count, index, num_devices, directory, *more = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    devices.silence_libraries()
    scenarios = {function.__name__: function for function in (exchange, restore, fail)}
    print(json.dumps(scenarios[scenario](pathlib.Path(directory), *more)), flush=True)
    jax.distributed.shutdown()  # waits for all, because a process is ended if the first one leaves before
