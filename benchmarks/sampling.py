"""Prints samples a second for each sampler and number of steps, and whether time is linear in them.

  python benchmarks/sampling.py [--config=configs/diffusion.py:vp] [--samplers=ddim,heun]
                                [--steps=10,20,40,80] [--batch=64] [--repeats=5]
                                [--config.any.field=value]

The network is the recipe's, untrained, without guidance. All take equal steps in time, from just
below the noisiest, where every sampler is defined. A line, seconds = fixed + slope times steps, is
fitted to the medians; the last column says how far off it the farthest of them lies.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from train import parse_overrides
from trainer import environment


def prepare(config, names: list[str], steps: list[int], batch: int):
  """{(sampler, steps): () -> None, done when it returns}, compiled."""
  import jax
  import jax.numpy as jnp

  from trainer import loop, recipe
  config.method.samples = {f"{name}_{n}": dict(sampler=name, steps=n,
                                               grid_options=dict(start=0.995))
                           for name in names for n in steps}
  built = recipe.build(config, data=recipe.stand_in(config))
  state = jax.jit(loop.initial_state(built))()
  label = {"label": jnp.arange(batch) % max(1, built.config.model.num_classes)}

  def one(name):
    inputs = state.params, state.extra, label, jax.random.key(0)
    compiled = jax.jit(built.method.predict[name]).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))
  return {(name, n): one(f"{name}_{n}") for name in names for n in steps}


def seconds(runs: dict, repeats: int) -> dict:
  """Median seconds of each after a first call: in turn, as what else runs would strike all."""
  taken = {name: [] for name in runs}
  for i in range(repeats + 1):
    for name, run in runs.items():
      began = time.perf_counter()
      run()
      taken[name] += [time.perf_counter() - began] if i else []
  return {name: statistics.median(times) for name, times in taken.items()}


def fit(steps: list[int], times: list[float]) -> tuple[float, float, float]:
  """The line through times, by least squares of relative errors.

  Returns seconds for no step, seconds a step, and the largest relative error.
  """
  lines = np.stack([np.ones(len(steps)), steps], 1) / np.array(times)[:, None]
  line, *_ = np.linalg.lstsq(lines, np.ones(len(steps)))
  return *line, np.abs(lines @ line - 1).max()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/diffusion.py:vp")
  parser.add_argument("--samplers", default="ddpm,ddim,euler,euler_maruyama,heun,dpmpp_2m,dpmpp_3m,"
                                            "dpmpp_2s,sde_dpmpp_2m")
  parser.add_argument("--steps", default="10,20,40,80")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=5)
  environment.add_flags(parser)
  args, rest = parser.parse_known_args()
  overrides, names = parse_overrides(rest, parser), args.samplers.split(",")
  environment.prepare(args)
  from trainer import recipe
  try:
    steps = [int(n) for n in args.steps.split(",")]
    config = recipe.load_config(args.config, overrides)
    runs = prepare(config, names, steps, args.batch)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  columns = ["sampler", *(f"{n} steps, samples/s" for n in steps), "fixed, ms", "a step, ms",
             "off the line"]
  print(f"{args.config}, batches of {args.batch}\n\n| {' | '.join(columns)} |\n"
        + "|---" * len(columns) + "|")
  for name in names:
    times = list(seconds({n: runs[name, n] for n in steps}, args.repeats).values())
    fixed, slope, off = fit(steps, times)
    cells = [name, *(f"{args.batch / t:,.1f}" for t in times), f"{1e3 * fixed:.1f}",
             f"{1e3 * slope:.2f}", f"{off:.1%}"]
    print(f"| {' | '.join(cells)} |", flush=True)
  return 0


if __name__ == "__main__":
  environment.keep_memory()
  sys.exit(main())
