"""Draws how a training step's time grows with batch, depth and tokens, beside its FLOPs.

  python benchmarks/scaling.py [--config=configs/vit.py] [--repeats=10] [--out=benchmarks]
                               [--config.any.field=value]

Prints a table and writes OUT/scaling.png. A prediction is the time at the middle point of its axis
times the ratio of model FLOPs. Times are medians of steps taken in turn.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sampling import seconds
from train import parse_overrides
from trainer import environment

AXES = {  # axis -> (override, its values); tokens are (pixels / patch)^2
  "batch": ("data.batch_size", (32, 48, 64, 96, 128)),
  "depth": ("model.depth", (2, 4, 6, 8, 12)),
  "tokens": ("augment.image_size", (32, 48, 64, 80, 96)),
}
# The middle of all axes: small enough for two cores, wide enough that products are the work. With
# AdamW: what Muon does for a step does not grow with the batch.
MIDDLE = {"data.batch_size": 64, "model.depth": 6, "augment.image_size": 64, "model.patch": 8,
          "model.width": 192, "model.heads": 3, "model.mlp_dim": 768, "augment.affine": None,
          "optimizer.name": "adamw", "optimizer.ns_steps": None}


def measure(name: str, overrides: dict, axis: str, repeats: int) -> list[dict]:
  """One dict for each value of an axis: value, flops, seconds, predicted (seconds)."""
  from benchmarks import train_step
  from trainer import loop, recipe
  field, values = AXES[axis]
  runs, flops = {}, {}
  for value in values:
    config = recipe.load_config(
      name, {key: str(x) for key, x in {**MIDDLE, field: value, **overrides}.items()})
    prepared = train_step.prepare(config)
    runs[value], flops[value] = prepared.step, loop.model_flops(prepared.built, prepared.abstract)
  times, middle = seconds(runs, repeats), values[len(values) // 2]
  patch = MIDDLE["model.patch"]
  return [{"value": (value // patch)**2 if axis == "tokens" else value, "flops": flops[value],
           "seconds": times[value], "predicted": times[middle] * flops[value] / flops[middle]}
          for value in values]


def figure(results: dict):
  """A panel for each axis: measured times and the line that FLOPs predict, with 15% around it."""
  from matplotlib.figure import Figure
  page = Figure((11, 3.6), layout="constrained")
  for axis, (name, points) in zip(page.subplots(1, len(results)), results.items()):
    x, predicted = ([point[key] for point in points] for key in ("value", "predicted"))
    axis.fill_between(x, [0.85 * t for t in predicted], [1.15 * t for t in predicted], alpha=0.2,
                      label="within 15%")
    axis.plot(x, predicted, label="in proportion to FLOPs")
    axis.plot(x, [point["seconds"] for point in points], "ko", label="measured")
    axis.set(xlabel=name, ylabel="seconds a step", ylim=0)
  axis.legend(loc="upper left")
  return page


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/vit.py")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--out", default="benchmarks")
  environment.add_flags(parser)
  args, rest = parser.parse_known_args()
  overrides = parse_overrides(rest, parser)
  environment.prepare(args)
  print("| axis | value | GFLOPs | ms | predicted, ms | off |\n|---|---|---|---|---|---|")
  results = {}
  for axis in AXES:
    results[axis] = measure(args.config, overrides, axis, args.repeats)
    for point in results[axis]:
      print(f"| {axis} | {point['value']} | {point['flops'] / 1e9:,.0f} | "
            f"{1e3 * point['seconds']:,.0f} | {1e3 * point['predicted']:,.0f} | "
            f"{point['seconds'] / point['predicted'] - 1:+.0%} |", flush=True)
  figure(results).savefig(Path(args.out) / "scaling.png", dpi=120)
  print("\n![Step time beside FLOPs](scaling.png)")
  return 0


if __name__ == "__main__":
  environment.keep_memory()
  sys.exit(main())
