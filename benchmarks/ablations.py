"""Trains the default supervised recipe with one choice of the Transformer changed, and tabulates.

  python benchmarks/ablations.py [--seeds=3] [--steps=N] [--only=SwiGLU,...] [--root=runs/ablations]

For each choice: its parameters, top-1 on font families never seen (mean and range over seeds) and
the time of a training step beside the default's, the two taking turns in one process. Without
--steps the recipe is trained as long as it is. A run that is finished in --root is not repeated.
Prints a table in Markdown.
"""

import argparse
import difflib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import train_step
from trainer import environment

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
}


def overrides(name: str, seed: int, steps: int | None) -> dict:
  length = {} if steps is None else {"total_steps": steps, "eval_every_steps": steps,
                                     "schedule.warmup_steps": max(1, steps // 26)}
  return {**CHOICES[name], **length, "seed": seed}


def train(name: str, seed: int, steps: int | None, root: Path, data_dir: str | None) -> float:
  """Top-1 of a run at its end; trains it if that is not there."""
  workdir = root / f"{name.replace(' ', '_')}_{seed}"
  metrics = workdir / "metrics.jsonl"
  command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}",
             *([f"--data_dir={data_dir}"] if data_dir else []),
             *(f"--config.{key}={value}" for key, value in overrides(name, seed, steps).items())]
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  return [row["eval/classification/top1"] for row in rows if "eval/classification/top1" in row][-1]


def prepare(name: str):
  from trainer import recipe
  return train_step.prepare(recipe.load_config(CONFIG, {
    key: str(value) for key, value in CHOICES[name].items()}))


def cost(name: str, rounds: int = 12) -> tuple[int, float]:
  """(parameters, median ratio of a step's processor time to the default's)."""
  sides, ratios = [prepare(name), prepare("default")], []
  for i in range(rounds + 2):
    spent = []
    for side in sides:
      began = time.process_time()
      side.step()
      spent.append(time.process_time() - began)
    ratios += [spent[0] / spent[1]] if i >= 2 else []
  return train_step.facts(sides[0])["parameters"], statistics.median(ratios)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, help="of each run; default the recipe's")
  parser.add_argument("--only", default=",".join(CHOICES), help="rows, with commas between")
  parser.add_argument("--root", type=Path, default=ROOT / "runs/ablations")
  parser.add_argument("--data_dir")
  args = parser.parse_args()
  names = args.only.split(",")
  for name in names:
    if name not in CHOICES:
      close = difflib.get_close_matches(name, CHOICES, 1)
      parser.error(f"--only: {name!r} is no row" + (f"; did you mean {close[0]!r}?" if close else
                                                    f" ({', '.join(CHOICES)})"))
  # All choices with one seed before the next seed: what is there when it is stopped compares.
  found = {name: [] for name in names}
  for seed in range(args.seeds):
    for name in names:
      found[name].append(train(name, seed, args.steps, args.root.resolve(), args.data_dir))
      print(f"{name}, seed {seed}: {found[name][-1]:.3f}", file=sys.stderr, flush=True)
  environment.prepare(argparse.Namespace(distributed=False, coordinator=None))
  print(f"| {CONFIG} with | parameters | top-1, unseen families | range | step time |\n"
        "|---|---|---|---|---|")
  for name, values in found.items():
    parameters, ratio = cost(name)
    print(f"| {name} | {parameters:,} | {statistics.mean(values):.3f} | {min(values):.3f} to "
          f"{max(values):.3f} | {ratio:.2f} |", flush=True)
  return 0


if __name__ == "__main__":
  environment.keep_memory()
  sys.exit(main())
