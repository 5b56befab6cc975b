"""Times a compiled training step of a recipe and prints one line of JSON.

  python benchmarks/train_step.py --config=configs/vit.py [--steps=30]

Shapes are the recipe's, images are noise: no data set is needed. `peak_share` is model FLOPs a
second over those of a large matrix product in the same dtype, measured in the same process.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


def noise(spec, seed: int = 0):
  """A batch of a recipe's shapes: bytes for images, zeros for what must stay in range."""
  import numpy as np
  rng = np.random.default_rng(seed)
  return {name: rng.integers(0, 256, s.shape, np.uint8) if s.dtype == np.uint8 else
          rng.normal(size=s.shape).astype(s.dtype) if s.dtype == np.float32 else
          np.zeros(s.shape, s.dtype) for name, s in spec.items()}


def measure(config, steps: int) -> dict:
  import jax

  from trainer import loop, recipe, sharding
  built = recipe.build(config, data=recipe.stand_in(config))
  abstract, shardings = loop.abstract_state(built)
  batch = sharding.to_device(noise(built.data.spec), config.data.batch_size, built.mesh)
  began = time.perf_counter()
  step = loop.jitted_step(built, shardings).lower(abstract, batch).compile()
  compilation = time.perf_counter() - began
  state = jax.jit(loop.initial_state(built), out_shardings=shardings)()
  seconds = []
  for i in range(steps + 3):
    began = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds += [time.perf_counter() - began] if i >= 3 else []
  median, flops = statistics.median(seconds), loop.model_flops(built, abstract)
  device = jax.devices()[0]
  peak = matmul_peak(config.dtype, 2048 if device.platform == "cpu" else 8192) * len(jax.devices())
  memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
  return {"config": config.config_name, "device": f"{len(jax.devices())} x {device.device_kind}",
          "jax": jax.__version__, "dtype": config.dtype, "batch": config.data.batch_size,
          "ms": 1e3 * median, "ms_quartiles": [1e3 * q for q in statistics.quantiles(seconds)[::2]],
          "images_per_second": config.data.batch_size / median, "model_flops": flops,
          "matmul_peak": peak, "peak_share": flops / median / peak,
          "compile_seconds": compilation, "peak_bytes": memory
          or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main():
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True)
  parser.add_argument("--steps", type=int, default=30)
  environment.add_flags(parser)
  args, rest = parser.parse_known_args()
  overrides = parse_overrides(rest, parser)
  environment.prepare(args)
  from trainer import recipe
  print(json.dumps(measure(recipe.load_config(args.config, overrides), args.steps)))


if __name__ == "__main__":
  environment.use_huge_pages()
  main()
