"""Times a compiled training step of a recipe and prints one line of JSON.

  python benchmarks/train_step.py --config=configs/vit.py [--steps=30] [--config.any.field=value]

Shapes are the recipe's, images are noise: no data set is needed. `peak_share` is model FLOPs a
second over those of a large matrix product in the same dtype, measured in the same process.
`--worker` takes steps when told to instead: benchmarks/worker.py.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import worker
from train import parse_overrides
from trainer import environment


def matmul_peak(dtype, size: int, repeats: int = 8) -> float:
  """FLOPs a second of [size, size] times [size, size], the best of several."""
  import jax
  import jax.numpy as jnp
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  best = float("inf")
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(product(a))
    best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best


def noise(spec, config, seed: int = 0):
  """A batch of a recipe's shapes: bytes for images, classes and tokens that there are."""
  import numpy as np
  rng = np.random.default_rng(seed)
  below = {"label": config.model.num_classes, "text": config.model.get("vocab_size")}
  return {name: rng.normal(size=s.shape).astype(s.dtype) if s.dtype == np.float32 else
          rng.integers(0, below.get(name, 256), s.shape, s.dtype) for name, s in spec.items()}


class Prepared(NamedTuple):
  step: Callable  # () -> None, done when it returns
  built: Any  # trainer.recipe.Recipe
  abstract: Any  # shapes of the state
  compilation: float  # seconds


def prepare(config) -> Prepared:
  """The compiled training step of a config, on one batch of noise that is on the device already."""
  import jax

  from trainer import loop, recipe, sharding
  built = recipe.build(config, data=recipe.stand_in(config))
  init = loop.initial_state(built)
  abstract, shardings = loop.abstract_state(built, init)
  batch = sharding.to_device(noise(built.data.spec, built.config), config.data.batch_size,
                             built.mesh)
  began = time.perf_counter()
  compiled = loop.compiled_step(built, abstract, shardings)
  compilation = time.perf_counter() - began
  state = jax.jit(init, out_shardings=shardings)()

  def step():
    nonlocal state
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
  return Prepared(step, built, abstract, compilation)


def parameters(prepared: Prepared) -> int:
  import jax
  return sum(x.size for x in jax.tree.leaves(prepared.abstract.params))


def facts(prepared: Prepared) -> dict:
  """What is known of a step before it is timed."""
  import jax

  from trainer import loop
  config, devices = prepared.built.config, jax.devices()
  size = 2048 if devices[0].platform == "cpu" else 8192
  return {"config": config.config_name, "dtype": config.dtype, "batch": config.data.batch_size,
          "device": devices[0].device_kind, "devices": len(devices),
          "version": f"jax {jax.__version__}",
          "parameters": parameters(prepared),
          "flops": loop.model_flops(prepared.built, prepared.abstract),
          "peak": matmul_peak(config.dtype, size) * len(devices),
          "compile_seconds": prepared.compilation}


def measure(prepared: Prepared, steps: int) -> dict:
  """The median time of a step after three that do not count, and what follows from it."""
  import jax
  seconds = []
  for i in range(steps + 3):
    began = time.perf_counter()
    prepared.step()
    seconds += [time.perf_counter() - began] if i >= 3 else []
  known, median = facts(prepared), statistics.median(seconds)
  memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return {**known, "ms": 1e3 * median,
          "ms_quartiles": [1e3 * q for q in statistics.quantiles(seconds)[::2]],
          "images_per_second": known["batch"] / median,
          "peak_share": known["flops"] / median / known["peak"],
          "peak_bytes": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main():
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True)
  parser.add_argument("--steps", type=int, default=30)
  parser.add_argument("--worker", action="store_true")
  environment.add_flags(parser)
  args, rest = parser.parse_known_args()
  overrides = parse_overrides(rest, parser)
  environment.prepare(args)
  from trainer import recipe
  prepared = prepare(recipe.load_config(args.config, overrides))
  if args.worker:
    worker.serve(prepared.step, **facts(prepared))
  else:
    print(json.dumps(measure(prepared, args.steps)))


if __name__ == "__main__":
  environment.keep_memory()
  main()
