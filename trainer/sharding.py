"""Where arrays live: the mesh, one short table of rules on parameter paths, batches."""

import math
import re
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.parts import path_name

# Tensor parallelism (1909.08053): heads of attention and hidden features of the MLP. A path that
# ends with the pattern is split along that axis; optimizer state and EMA follow, having the paths.
TENSOR_RULES: Mapping[str, int] = {
  r"blocks/.*attention/qkv_kernel": -2,                                      # ... d 3 k h
  r"blocks/.*attention/qkv_bias": -2,                                        # ... 3 k h
  r"blocks/.*attention/out/kernel": -3,                                      # ... k h d
  r"blocks/.*mlp/up/kernel": -1,                                             # ... d hidden
  r"blocks/.*mlp/up/bias": -1,                                               # ... hidden
  r"blocks/.*mlp/down/kernel": -2,                                           # ... hidden d
}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh with axes data, fsdp, tensor; one size may be -1 and takes the devices that are left.

  Args:
    data: devices that share a batch, each with all parameters.
    fsdp: devices that share a batch and the parameters.
    tensor: devices that share heads and MLPs (1909.08053).
    devices: which; None = all.

  Raises ValueError where the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
    raise ValueError(f"mesh = {sizes}: sizes are at least 1, and one of them may be -1")
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f"mesh = {sizes}: the sizes must multiply to the {len(devices)} devices")
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3, devices=devices)


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """How one array of the state is split.

  `tensor` by TENSOR_RULES; then `fsdp` (1910.02054) along the longest axis left that it divides,
  never the layer axis of a scanned stack. Raises ValueError where `tensor` does not divide.
  """
  spec = [None] * len(shape)
  for pattern, axis in TENSOR_RULES.items():
    if mesh.shape["tensor"] > 1 and re.search(pattern + "$", path) and len(shape) >= -axis:
      if shape[axis] % mesh.shape["tensor"]:
        raise ValueError(f"mesh.tensor = {mesh.shape['tensor']} does not divide axis {axis} of "
                         f"{path}, shape {shape} (attention heads and MLP width must divide)")
      spec[axis] = "tensor"
  stacked = "blocks" in path.split("/")
  axes = [i for i in range(int(stacked), len(shape))
          if spec[i] is None and shape[i] % mesh.shape["fsdp"] == 0 and shape[i] > 1]
  if mesh.shape["fsdp"] > 1 and axes:
    spec[max(axes, key=lambda i: shape[i])] = "fsdp"
  return PartitionSpec(*spec)


def shard_state(state, mesh: Mesh):
  """A tree of NamedShardings for a tree of arrays or shapes."""
  return jax.tree.map_with_path(
    lambda path, x: NamedSharding(mesh, leaf_spec(path_name(path), x.shape, mesh)), state)


def layout(tree, mesh: Mesh) -> list[tuple[str, tuple[int, ...], PartitionSpec]]:
  """(path, shape, how it is split) of every array of a tree, to be printed."""
  return [(path_name(path), x.shape, leaf_spec(path_name(path), x.shape, mesh))
          for path, x in jax.tree.leaves_with_path(tree)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = "data.batch_size",
                times: tuple[int, str] = (1, "")):
  """Raises ValueError where a batch does not divide over accumulation and devices.

  `times` is how often a phase of the method is taken in a step, and its name.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % (ways * accumulate * times[0]):
    taken = f" x times ({times[0]}) of phase {times[1]}" if times[0] > 1 else ""
    raise ValueError(f"{field} = {batch_size} is not a multiple of "
                     f"{ways * accumulate * times[0]}: mesh.data "
                     f"({mesh.shape['data']}) x mesh.fsdp ({mesh.shape['fsdp']}) x accumulate "
                     f"({accumulate}){taken}")


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a global batch this process holds."""
  slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = {i for (s,) in slices for i in range(*s.indices(batch_size))}
  return np.array(sorted(rows))


def agreed(value: bool) -> bool:
  """Process 0's answer, on every process: for decisions that lead to collective work."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def check_agreement(facts: Mapping[str, str]):
  """Raises ValueError on every process unless all of them have the same facts."""
  if jax.process_count() == 1:
    return
  words = [zlib.crc32(facts[name].encode()) for name in sorted(facts)]
  everyone = multihost_utils.process_allgather(np.array(words, np.uint32))   # process fact
  for name, column in zip(sorted(facts), everyone.T):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ValueError(f"processes do not agree on the {name}: {others.tolist()} differ from "
                       f"process 0. Start all of them with the same command, code and data")


def compiler_options(mesh: Mesh) -> dict:
  """LLVM's second level on CPUs: its third takes a quarter longer, and gives slower steps."""
  return {"xla_backend_optimization_level": 2} if mesh.devices.flat[0].platform == "cpu" else {}


def to_device(batch, batch_size: int, mesh: Mesh):
  """This process's rows of a batch (NumPy) -> global arrays on the mesh."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
          for name, x in batch.items()}
