"""Kills a run with SIGKILL at random moments, continues it, and compares with an unbroken one.

  python benchmarks/kill.py --config=configs/mae.py:smoke [--kills=20] [--seed=0]

Each of the runs is killed once: at a random time after its start, so in start-up, steps, saves and
evaluations alike. Prints one line a kill, and exits 0 only if every run ended bit-identical.
"""

import argparse
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer import checkpoints
from trainer.logging import read_metrics


def start(args, workdir, data_dir):
  return subprocess.Popen(
    [sys.executable, "train.py", f"--config={args.config}", f"--workdir={workdir}",
     f"--data_dir={data_dir}", "--config.total_steps=300", "--config.eval_every_steps=60",
     "--config.log_every_steps=5", "--config.checkpoint.every_steps=25",
     "--config.ema_decay=0.99"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def outcome(workdir):
  """(metrics by step without what the clock says, the last checkpoint's arrays)."""
  rows = [{k: v for k, v in row.items() if k != "time" and "per_second" not in k}
          for row in read_metrics(workdir)]
  store = checkpoints.Checkpoints(workdir, read_only=True)
  items = store.manager.restore(store.steps()[-1], args=None)
  trees = {name: items[name] for name in ("params", "opt", "extra", "ema") if name in items}
  return rows, [np.asarray(x) for x in jax.tree.leaves(trees)]


def same(a, b) -> bool:
  return a[0] == b[0] and all((x == y).all() for x, y in zip(a[1], b[1], strict=True))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/mae.py:smoke")
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)
  folder, rng, failures = Path(tempfile.mkdtemp()), random.Random(args.seed), 0
  start(args, folder / "warm", folder / "data").wait()  # data prepared, programs compiled
  began = time.monotonic()
  assert start(args, folder / "whole", folder / "data").wait() == 0
  length = time.monotonic() - began
  expected = outcome(folder / "whole")
  kill = 0
  while kill < args.kills:
    workdir = folder / "killed"
    process = start(args, workdir, folder / "data")
    moment = rng.uniform(0.3, 1.0) * length
    try:
      process.wait(moment)
      shutil.rmtree(workdir)  # it had ended: another try
      continue
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    kill += 1
    rows = read_metrics(workdir)
    half = [p.name for p in (workdir / "checkpoints").glob("*tmp*")]
    where = f"at step {rows[-1]['step'] if rows else 0}" + (f", writing {half}" if half else "")
    status = start(args, workdir, folder / "data").wait()
    good = status == 0 and same(outcome(workdir), expected)
    failures += not good
    print(f"kill {kill:2} after {moment:5.1f} s, {where}: "
          + ("identical" if good else f"DIFFERENT (status {status})"), flush=True)
    shutil.rmtree(workdir)
  shutil.rmtree(folder)
  print(f"{args.kills - failures} passed, {failures} failed")
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
