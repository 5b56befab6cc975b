"""Stops runs at random moments, continues them, and compares their ends with unbroken runs.

  python benchmarks/kill.py [--configs mae.py:smoke ...] [--stops=20] [--signals KILL TERM PAIR]

A run is stopped again and again until it gets to its end: while it starts, prepares its data, takes
steps, saves or evaluates; then the next one begins from nothing, until as many stops were made. A
run that ends must have every metric and every array of one that nobody stopped, bit for bit. After
SIGTERM it must leave by itself, with status 75, within 10 seconds and what one batch takes. PAIR
stops nothing: two processes are started on one run directory, and one of them has to be refused.
Prints one line a run and one a recipe, and exits 0 only if all of them are as they should be.
"""

import argparse
import itertools
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer import checkpoints
from trainer.environment import PREEMPTED
from trainer.logging import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("total_steps=60", "eval_every_steps=20", "log_every_steps=5", "checkpoint.every_steps=8",
         "ema_decay=0.99")
PATIENCE = 20.0  # seconds to leave after SIGTERM: ten, and a batch on a machine with other work


class Stop(NamedTuple):
  """One stop: how it went, and whether that is as it should be."""

  where: str
  good: bool
  seconds: float  # from the signal to the end of the process


def start(config: str, workdir: Path, data_dir: Path) -> subprocess.Popen:
  mae = workdir.parent / "mae"  # what finetune.py starts from
  init = [f"--config.init={mae}"] if config.startswith("finetune") else []
  with open(workdir.with_suffix(".txt"), "a") as out:
    return subprocess.Popen(
      [sys.executable, "train.py", f"--config=configs/{config}", f"--workdir={workdir}",
       f"--data_dir={data_dir}", *(f"--config.{flag}" for flag in FLAGS), *init],
      cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)


def outcome(workdir: Path):
  """(metrics by step without what the clock says, the last checkpoint's arrays)."""
  rows = [{k: v for k, v in row.items() if k != "time" and "per_second" not in k}
          for row in read_metrics(workdir)]
  store = checkpoints.Checkpoints(workdir, read_only=True)
  items = store.manager.restore(store.steps()[-1], args=None)
  trees = {name: items[name] for name in ("params", "opt", "extra", "ema") if name in items}
  return rows, [np.asarray(x) for x in jax.tree.leaves(trees)]


def same(a, b) -> bool:
  return a[0] == b[0] and all((x == y).all() for x, y in zip(a[1], b[1], strict=True))


def stopped(process, name: str, moment: float, workdir: Path, data_dir: Path) -> Stop | None:
  """Waits for the moment and stops the process; None if it had ended by itself before it."""
  try:
    process.wait(moment)
    return None
  except subprocess.TimeoutExpired:
    began = time.monotonic()
    process.send_signal(getattr(signal, f"SIG{name}"))
    status = process.wait()
  seconds = time.monotonic() - began
  rows = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
  half = any(workdir.glob("checkpoints/*tmp*"))
  where = (f"{moment:.1f}s/step {rows[-1]['step'] if rows else 0}" + ("/saving" if half else "")
           + ("" if any(data_dir.rglob("dataset_info.json")) else "/no data yet"))
  by_itself = status in (PREEMPTED, 0, -signal.SIGTERM)  # killed outright only before it listens
  return Stop(where, name == "KILL" or by_itself and seconds < PATIENCE, seconds)


def one_run(config, name, folder: Path, expected, moments, left: int) -> tuple[list[Stop], bool]:
  """Stops one run up to `left` times; (the stops, whether its end is the expected one)."""
  workdir, data_dir, stops = folder / "stopped", folder / "data", []
  while len(stops) < left:
    process = start(config, workdir, data_dir)
    stop = stopped(process, name, next(moments), workdir, data_dir)
    if stop is None:
      break
    stops.append(stop)
  status = process.returncode if stop is None else start(config, workdir, data_dir).wait()
  good = status == 0 and same(outcome(workdir), expected) and all(s.good for s in stops)
  if not good:
    print(workdir.with_suffix(".txt").read_text()[-3000:])
  for path in (workdir, data_dir):
    shutil.rmtree(path, ignore_errors=True)
  workdir.with_suffix(".txt").unlink()
  return stops, good


def pair(config: str, folder: Path, expected, pause: float) -> bool:
  """Starts two on one run directory; whether one is refused, and the other ends as alone."""
  workdir = folder / "pair"
  processes = [start(config, workdir, folder / "data")]
  time.sleep(pause)
  processes.append(start(config, workdir, folder / "data"))
  statuses = sorted(process.wait() for process in processes)
  said = workdir.with_suffix(".txt").read_text()
  good = statuses == [0, 1] and "is being written by process" in said and same(
    outcome(workdir), expected)
  if not good:
    print(said[-3000:])
  shutil.rmtree(workdir)
  workdir.with_suffix(".txt").unlink()
  return good


def recipe(config: str, names: list[str], count: int, seed: int) -> int:
  """Every stop of one recipe; how many were of runs that did not end as they should."""
  folder, bad = Path(tempfile.mkdtemp()), 0
  if config.startswith("finetune"):
    start("mae.py:smoke", folder / "mae", folder / "warm_data").wait()
  start(config, folder / "warm", folder / "warm_data").wait()  # programs compiled
  began = time.monotonic()
  if start(config, folder / "whole", folder / "data").wait():
    raise SystemExit((folder / "whole.txt").read_text())
  length, expected = time.monotonic() - began, outcome(folder / "whole")
  shutil.rmtree(folder / "data")
  if "PAIR" in names:
    draws = random.Random(f"{seed} {config}")
    wrong = sum(not pair(config, folder, expected, draws.uniform(0, 2)) for _ in range(count))
    print(f"{config}: {count} pairs on one run directory, {wrong} wrong", flush=True)
    bad += wrong
  for name in names:
    if name == "PAIR":
      continue
    made, draws = [], itertools.repeat(random.Random(f"{seed} {config} {name}"))
    moments = (rng.uniform(0.1, 1.0) * length for rng in draws)
    while len(made) < count:
      stops, good = one_run(config, name, folder, expected, moments, count - len(made))
      made += stops
      bad += 0 if good else max(1, len(stops))
      print(f"  {config} {name}: {', '.join(stop.where for stop in stops) or 'ended'}: "
            f"{'identical' if good else 'DIFFERENT'}", flush=True)
    print(f"{config} SIG{name}: {count} stops, {bad} of them of a run with another end; "
          f"the longest to leave {max(stop.seconds for stop in made):.1f} s", flush=True)
  shutil.rmtree(folder)
  return bad


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  every = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name != "base.py")
  parser.add_argument("--configs", nargs="+", default=[f"{name}:smoke" for name in every])
  parser.add_argument("--signals", nargs="+", choices=["KILL", "TERM", "PAIR"],
                      default=["KILL", "TERM"])
  parser.add_argument("--stops", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  logging.getLogger("absl").setLevel(logging.ERROR)
  bad = sum(recipe(config, args.signals, args.stops, args.seed) for config in args.configs)
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
