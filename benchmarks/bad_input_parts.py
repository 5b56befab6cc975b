"""What the cases of benchmarks/bad_inputs.py are made of: data, runs, signals, disks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
               "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
                            "--xla_backend_optimization_level=0",
               "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "bad_inputs_cache")}
SMOKE = "configs/vit.py:smoke"
STOPPED = 75


class Case(NamedTuple):
  kind: str
  name: str
  flags: tuple = ()  # of train.py, after the common ones; {} is the case's folder
  says: str = ""  # regular expression of the error's line
  prepare: Callable = lambda folder: None
  status: int = 1
  left: str = "no run"  # what is left: `state_of` the run directory
  command: Callable | None = None  # (folder, flags) -> CompletedProcess, in the place of train.py
  config: str = SMOKE


class Skip(Exception):
  """This machine has not what a case needs."""


# --- What cases are made of -----------------------------------------------------------------------

def paint(folder, count=16, splits=("train", "test"), classes=("green", "red"), suffix="png"):
  """Noisy images of 16 pixels, in a folder a class."""
  rng = np.random.default_rng(0)
  for split in splits:
    for j, name in enumerate(classes):
      path = folder / split / name
      path.mkdir(parents=True, exist_ok=True)
      for i in range(count):
        pixels = rng.normal(60 + 120 * j, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02}.{suffix}")
  return folder


def pairs(folder, header="file_name,text", row="{}.png,a picture of {}", encoding="utf-8"):
  paint(folder, splits=("train", "test"), classes=("",))
  for split in ("train", "test"):
    rows = [header, *(row.format(f"{i:02}", i) for i in range(16))]
    (folder / split / "metadata.csv").write_text("\n".join(rows), encoding=encoding)
  return folder


def run(folder, flags, config=SMOKE, environment=(), wait=True, program="train.py"):
  """train.py on the case's data, as a process."""
  common = [f"--config={config}", f"--workdir={folder}/run", "--config.data.batch_size=8",
            f"--config.data.source=folder:{folder}/data"] if program == "train.py" else []
  if "vit" in config and common:
    common.append("--config.augment.affine=none")
  process = subprocess.Popen(
    [sys.executable, program, *common, *(flag.replace("{}", str(folder)) for flag in flags)],
    cwd=ROOT, env={**os.environ, **ENVIRONMENT, **dict(environment)}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace")
  return finished(process) if wait else process


def finished(process):
  out, err = process.communicate(timeout=600)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(process, there: Callable, seconds=120):
  deadline = time.monotonic() + seconds
  while not there() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.02)


def state_of(workdir: Path) -> str:
  """What a run directory holds: "no run", or the steps of its whole checkpoints."""
  if not (workdir / "config.json").exists():
    return "no run"
  from trainer import checkpoints
  steps = []
  for path in (workdir / "checkpoints").glob("[0-9]*"):
    with contextlib.suppress(checkpoints.CheckpointError, ValueError, OSError):
      checkpoints.load_run(workdir, int(path.name))
      steps.append(int(path.name))
  return f"steps {', '.join(map(str, sorted(steps)))}" if steps else "no checkpoint"


def trained(folder):
  """A finished run of six steps, with a checkpoint at 3 and at 6."""
  paint(folder / "data")
  done = run(folder, ["--config.checkpoint.every_steps=3"])
  assert done.returncode == 0, done.stderr


def signalled(number, there: Callable, *flags, then=()):
  """A run that gets a signal once `there(workdir)`; and, if `then`, the same command again."""
  def command(folder, _):
    process = run(folder, ["--config.total_steps=2000", *flags], wait=False)
    wait_for(process, lambda: there(folder / "run"))
    process.send_signal(number)
    done = finished(process)
    return run(folder, then) if then else done
  return command


def has_step(workdir, step=20):
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and f'"step": {step}' in metrics.read_text()


def on_disk(size: str, *flags, read_only=False):
  """A run in a workdir on a disk of that size."""
  def command(folder, _):
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)],
                      capture_output=True).returncode:
      raise Skip("mounting a disk needs root")
    try:
      if read_only:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
      done = run(folder, [*flags, f"--workdir={disk}/run"])
      if (disk / "run").exists():
        shutil.copytree(disk / "run", folder / "run", dirs_exist_ok=True)
      return done
    finally:
      subprocess.run(["umount", str(disk)], check=True)
  return command


def other_program(program, *flags):
  return lambda folder, _: run(folder, flags, program=program)


def two_at_once(folder, _):
  first = run(folder, ["--config.total_steps=400"], wait=False)
  wait_for(first, lambda: (folder / "run" / "in_use.json").exists())
  second = run(folder, ["--config.total_steps=400"])
  wait_for(first, lambda: has_step(folder / "run"))
  first.send_signal(signal.SIGTERM)
  assert finished(first).returncode == STOPPED
  return second


def put(path: str, content, then=paint):
  """Prepares data, and writes a file into the case's folder."""
  def prepare(folder):
    then(folder / "data")
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
      content.save(file)
    else:
      file.write_bytes(content if isinstance(content, bytes) else content.encode())
  return prepare


def plain(folder):
  paint(folder / "data")


def damaged(*steps):
  def prepare(folder):
    trained(folder)
    for step in steps:
      files = (p for p in (folder / "run/checkpoints" / str(step)).rglob("*") if p.is_file())
      largest = max(files, key=lambda p: p.stat().st_size)
      largest.write_bytes(largest.read_bytes()[:100])
    for path in (folder / "run/checkpoints").glob("6"):
      if 6 not in steps:
        shutil.rmtree(path)
  return prepare


def cut_jpeg(folder):
  paint(folder / "data", count=20, suffix="jpg")
  file = folder / "data/train/green/07.jpg"
  file.write_bytes(file.read_bytes()[:-20])


def field(flag, says, kind="config"):
  return Case(kind, flag, (f"--config.{flag}",), says, plain)
