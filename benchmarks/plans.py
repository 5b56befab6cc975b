"""Regenerates README's table of what each ImageNet recipe costs on a slice of 256 TPU v5e chips.

  python benchmarks/plans.py [--topology=v5e:16x16] [configs/mae.py:imagenet_b16 ...]

Compiles each training step ahead of time, in a process of its own; needs the libtpu package.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent


def recipes() -> list[str]:
  """Every ImageNet variant of every config."""
  return [f"configs/{path.stem}.py:{variant}" for path in sorted((ROOT / "configs").glob("*.py"))
          for variant in getattr(importlib.import_module(f"configs.{path.stem}"), "VARIANTS", ())
          if "imagenet" in variant]


def row(plan: dict) -> str:
  moved = ", ".join(f"{kind} {entry['bytes'] / 2**20:,.0f}"
                    for kind, entry in plan["collectives"].items())
  return (f"| `{plan['config']}` | {plan['batch_size']:,} | {plan['parameters'] / 1e6:.1f} M | "
          f"{plan['model_flops'] / 1e12:,.0f} | {plan['bytes_per_device'] / 2**30:.2f} of "
          f"{plan['memory_bytes'] / 2**30:.0f} | {'yes' if plan['fits'] else 'NO'} | {moved} | "
          f"{1e3 * plan['step_time_roofline']:.1f} | {plan['mfu_roofline']:.0%} |")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topology", default="v5e:16x16")
  parser.add_argument("recipes", nargs="*")
  args = parser.parse_args()
  rows = []
  for name in args.recipes or recipes():
    command = [sys.executable, "plan.py", f"--config={name}", f"--topology={args.topology}",
               "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
      raise SystemExit(f"{name}: {done.stderr.splitlines()[-1]}")
    rows.append(row(json.loads(done.stdout.splitlines()[-1])))
    print(rows[-1], flush=True)
  table = f"""`python benchmarks/plans.py --topology={args.topology}` wrote this table: the step of
each recipe compiled ahead of time, data parallel, bfloat16. Memory is GiB a chip, collectives are
MiB a step. The roofline takes the longest of compute, memory and interconnect time by the chip's
published figures: a bound that no run reaches.

| recipe | batch | parameters | TFLOPs | memory | fits | moved | roofline, ms | MFU at most |
|---|---|---|---|---|---|---|---|---|
""" + "\n".join(rows)
  readme.replace(ROOT / "README.md", "plans", table)


if __name__ == "__main__":
  main()
