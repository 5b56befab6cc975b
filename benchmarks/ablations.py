"""Trains the default supervised recipe with one choice of the Transformer changed, and tabulates.

  python benchmarks/ablations.py [--seeds=3] [--steps=N] [--only=SwiGLU,...] [--root=runs/ablations]
                                 [--jobs=1] [--data_dir=DIR]

For each choice: its parameters, top-1 on font families never seen (mean, standard deviation and
range over seeds), and its steps a second, also as a multiple of the default's, the two taking turns
in one process. Without --steps the recipe is trained as long as it is. --jobs runs train at a time,
each on its share of the cores. A run that is finished in --root is not repeated. Prints the table
in Markdown; with all choices it replaces README's.
"""

import argparse
import difflib
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import readme, sampling, train_step
from configs.vit import get_config
from trainer import environment

METRIC = "eval/classification/top1"
ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/vit.py"
CHOICES = {  # row of the table -> what is changed
  "default": {},
  "post-norm": {"model.placement": "post"},
  "sandwich norm": {"model.placement": "sandwich"},
  "DeepNorm": {"model.placement": "deepnorm"},
  "RMSNorm": {"model.norm": "rmsnorm"},
  "no norm": {"model.norm": "none"},
  "qk-norm": {"model.qk_norm": True},
  "ReLU": {"model.activation": "relu"},
  "tanh GELU": {"model.activation": "gelu_tanh"},
  "quick-GELU": {"model.activation": "quick_gelu"},
  "SiLU": {"model.activation": "silu"},
  "GLU": {"model.activation": "glu"},
  "Bilinear": {"model.activation": "bilinear"},
  "ReGLU": {"model.activation": "reglu"},
  "GEGLU": {"model.activation": "geglu"},
  "SwiGLU": {"model.activation": "swiglu"},
  "no positions": {"model.positions": "none"},
  "learned positions": {"model.positions": "learned"},
  "1-D sinusoidal": {"model.positions": "sinusoidal"},
  "relative bias": {"model.positions": "relative"},
  "bias by bucket": {"model.positions": "buckets"},
  "axial RoPE": {"model.positions": "rope"},
  "2-D ALiBi": {"model.positions": "alibi"},
  "window of 2": {"model.window": 2},
  "early convolutions": {"model.patch_stem": "early_conv"},
  "ResNet stem": {"model.patch_stem": "resnet"},
}


def overrides(name: str, seed: int, steps: int | None) -> dict:
  """What differs from the recipe; the warm-up keeps its share of a run of another length."""
  recipe = get_config()
  steps = steps or recipe.total_steps
  warmup = recipe.schedule.warmup_steps * steps // recipe.total_steps
  return {**CHOICES[name], "total_steps": steps, "eval_every_steps": steps, "seed": seed,
          "schedule.warmup_steps": max(1, warmup)}


def train(name: str, seed: int, args, cores: list[int]) -> float:
  """Top-1 of a run at its end; trains it if that is not there."""
  workdir = args.root.resolve() / f"{name.replace(' ', '_')}_{seed}"
  pinned = ["taskset", "-c", ",".join(map(str, cores))] if args.jobs > 1 else []
  command = [*pinned, sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}",
             *([f"--data_dir={args.data_dir}"] if args.data_dir else []),
             *(f"--config.{k}={v}" for k, v in overrides(name, seed, args.steps).items())]
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  top1 = [row[METRIC] for row in rows if METRIC in row][-1]
  print(f"{name}, seed {seed}: {top1:.3f}", file=sys.stderr, flush=True)
  return top1


def train_all(names: list[str], args) -> dict[str, list[float]]:
  """Top-1 of each choice by seed. The first run goes alone: it prepares the data."""
  cores, free = sorted(os.sched_getaffinity(0)) if args.jobs > 1 else [], queue.SimpleQueue()
  for job in range(args.jobs):
    free.put(cores[job::args.jobs])

  def one(name, seed):
    share = free.get()
    try:
      return train(name, seed, args, share)
    finally:
      free.put(share)

  # All choices with one seed before the next seed: what is there when it is stopped compares.
  runs = [(name, seed) for seed in range(args.seeds) for name in names]
  found = [one(*runs[0])]
  with ThreadPoolExecutor(args.jobs) as pool:
    found += pool.map(one, *zip(*runs[1:])) if runs[1:] else []
  return {name: found[i::len(names)] for i, name in enumerate(names)}


def prepare(name: str):
  from trainer import recipe
  return train_step.prepare(recipe.load_config(CONFIG, {
    key: str(value) for key, value in CHOICES[name].items()}))


def row(name: str, values: list[float], default: train_step.Prepared, rounds: int = 12) -> str:
  prepared = prepare(name)
  taken = sampling.seconds({"this": prepared.step, "default": default.step}, rounds)
  deviation = statistics.stdev(values) if len(values) > 1 else 0
  changed = ", ".join(f"`{key}={value}`" for key, value in CHOICES[name].items())
  return (f"| {name} | {changed} | {train_step.parameters(prepared):,} | "
          f"{statistics.mean(values):.3f} ± {deviation:.3f} | {min(values):.3f} to "
          f"{max(values):.3f} | {1 / taken['this']:.1f} | {taken['default'] / taken['this']:.2f} |")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, help="of each run; default the recipe's")
  parser.add_argument("--only", help="rows, with commas between")
  parser.add_argument("--root", type=Path, default=ROOT / "runs/ablations")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (more need taskset)")
  parser.add_argument("--data_dir")
  args = parser.parse_args()
  if min(args.seeds, args.jobs, args.steps or 1) < 1:
    parser.error("--seeds, --steps and --jobs are at least 1")
  if args.jobs > 1 and (not shutil.which("taskset") or args.jobs > len(os.sched_getaffinity(0))):
    parser.error(f"--jobs={args.jobs}: needs taskset (util-linux) and as many cores")
  names = args.only.split(",") if args.only else list(CHOICES)
  for name in names:
    if name not in CHOICES:
      close = difflib.get_close_matches(name, CHOICES, 1)
      parser.error(f"--only: {name!r} is no row" + (f"; did you mean {close[0]!r}?" if close else
                                                    f" ({', '.join(CHOICES)})"))
  found = train_all(names, args)
  environment.prepare(argparse.Namespace(distributed=False, coordinator=None))
  lines = ["| | changed | parameters | top-1 | range | steps/s | speed |", "|" + "---|" * 7]
  default = prepare("default")
  lines += [row(name, values, default) for name, values in found.items()]
  print("\n".join(lines))
  if not args.only:
    steps = args.steps or get_config().total_steps
    told = (f"Runs of {steps:,} steps, {args.seeds} seeds. `speed` is that of a training step "
            "beside the default's, uncertain by a tenth.")
    readme.replace(ROOT / "README.md", "ablations", "\n".join([told, "", *lines]))
  return 0


if __name__ == "__main__":
  environment.keep_memory()
  sys.exit(main())
