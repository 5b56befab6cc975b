"""What a compiled training step will cost on a topology: memory, collectives, a roofline."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from trainer import loop


class Chip(NamedTuple):
  """One TPU chip, from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"."""

  flops: float  # bfloat16, a second
  memory: int  # bytes of HBM
  bandwidth: float  # of HBM, bytes a second
  interconnect: float  # of all ICI links, bytes a second


CHIPS: Mapping[str, Chip] = {
  "v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
  "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
  "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
  "v6e": Chip(918e12, 32 * 2**30, 1.640e12, 448e9),
}


def topology_devices(name: str) -> list:
  """`v5e:16x16` or `cpu:8` -> devices to compile for, which need not exist.

  Raises ValueError on an unknown name, or where libtpu is missing.
  """
  kind, _, shape = name.partition(":")
  if kind == "cpu" and shape.isdigit():
    if len(jax.devices("cpu")) < int(shape):
      raise ValueError(f"--topology={name}: this process has {len(jax.devices('cpu'))} CPU devices")
    return jax.devices("cpu")[:int(shape)]
  if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    raise ValueError(f"--topology={name}: expected cpu:N, or one of {', '.join(CHIPS)} with a "
                     "shape, such as v5e:16x16 or v4:4x4x4")
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as error:
    raise ValueError(f"--topology={name}: {str(error).splitlines()[0]}. TPU topologies need the "
                     "libtpu package (pip install libtpu)") from error


BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def _bytes(text: str) -> list[int]:
  """The sizes of the arrays in a piece of HLO, such as `(f32[8,4]{1,0}, bf16[2]{0})`."""
  return [BYTES[kind] * int(np.prod([int(side) for side in sides.split(",") if side], dtype=int))
          for kind, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text) if kind in BYTES]


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """kind -> {count, bytes} of one run of a compiled program, from its text.

  Bytes are of the whole array that a device takes part in: what is reduced, what is gathered, what
  is scattered. A loop's body counts as often as it runs.
  """
  bodies: dict[str, list[str]] = {}
  for line in hlo.splitlines():
    header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if header and not line.startswith(" "):
      name = "ENTRY" if line.startswith("ENTRY") else header.group(1)
      bodies[name] = []
    elif bodies:
      bodies[name].append(line)

  def trips(line: str, condition: str) -> int:
    """How often a loop runs: as the compiler noted it, else what its counter is compared with."""
    known = re.search(r'known_trip_count.{1,6}n"?:"?(\d+)', line)
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies.get(condition, [])))
    return int(known[1]) if known else max(map(int, limits), default=1)

  def visit(name: str) -> Counter:
    total = Counter()
    for line in bodies.get(name, []):
      op = re.search(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\((.*?)\)", line)
      if op:
        result, kind, start, _ = op.groups()
        sizes = _bytes(result)
        if start and kind == "all-gather":  # a started one's result holds the operands too
          sizes = sizes[len(sizes) // 2:]
        elif start and kind == "collective-permute":
          sizes = sizes[1:2]
        moved = sum(sizes)
        if kind == "reduce-scatter":
          groups = re.search(r"replica_groups=\{\{([\d,]+)\}|replica_groups=\[\d+,(\d+)\]", line)
          if groups:
            moved *= len(groups[1].split(",")) if groups[1] else int(groups[2])
        total[kind, "count"] += 1
        total[kind, "bytes"] += moved
      condition = re.search(r"condition=%?([\w.\-]+)", line)
      times = trips(line, condition[1]) if condition else 1
      for callee in re.findall(r"(?:body=|to_apply=|calls=|branch_computations=\{)%?([\w.\-]+)",
                               line):
        if callee in bodies and not op:
          inner = visit(callee)
          for key in inner:
            total[key] += inner[key] * times
    return total

  total = visit("ENTRY")
  return {kind: {"count": total[kind, "count"], "bytes": total[kind, "bytes"]}
          for kind in KINDS if total[kind, "count"]}


def compile_step(recipe):
  """(compiled training step, abstract state) of a recipe on its mesh, real or not."""
  state, shardings = loop.abstract_state(recipe)
  return loop.compiled_step(recipe, state, shardings), state


def plan(recipe, topology: str) -> dict:
  """The figures of a recipe on a topology, JSON-ready. Times in seconds, None without a chip."""
  compiled, state = compile_step(recipe)
  memory, chip = compiled.memory_analysis(), CHIPS.get(topology.partition(":")[0])
  devices = recipe.mesh.size
  flops = loop.model_flops(recipe, state)
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  total = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
  moved = collectives(compiled.as_text())
  result = {
    "config": recipe.config.config_name, "topology": topology, "devices": devices,
    "mesh": dict(recipe.mesh.shape), "batch_size": recipe.config.data.batch_size,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "model_flops": flops, "bytes_per_device": total, "argument_bytes": arguments,
    "temporary_bytes": temporaries, "collectives": moved, "fits": None, "memory_bytes": None,
    "step_time_roofline": None, "mfu_roofline": None}
  if chip:
    # A ring moves an array about twice to reduce it on all, once to gather or scatter it.
    link_bytes = sum(entry["bytes"] * (2 if kind == "all-reduce" else 1)
                     for kind, entry in moved.items())
    times = {"compute": flops / devices / chip.flops,
             # At least: the state read and written, temporaries written and read.
             "memory": (2 * arguments + 2 * temporaries) / chip.bandwidth,
             "interconnect": link_bytes / chip.interconnect}
    slowest = max(times.values())
    result |= {"fits": total <= chip.memory, "memory_bytes": chip.memory, "times": times,
               "step_time_roofline": slowest, "mfu_roofline": times["compute"] / slowest}
  return result
