"""Runs for tests: broken off and continued, and compared; a disk that is soon full."""

import contextlib
import shutil
import subprocess

import chex
import pytest

import train
from trainer import checkpoints
from trainer.logging import read_metrics


def curve(workdir):
  """The rows of a run's metrics without what a clock says."""
  return [{k: v for k, v in row.items() if k != "time" and "per_second" not in k}
          for row in read_metrics(workdir)]


def broken_off(flags, folder, lost=(4, 6)):
  """A run, and the same continued without its checkpoints `lost`: equal bit for bit.

  Returns (its workdir, its rows that have a loss).
  """
  whole, cut = folder / "whole", folder / "cut"
  assert train.main([*flags, f"--workdir={whole}"]) == 0
  shutil.copytree(whole, cut)
  for step in lost:
    shutil.rmtree(cut / "checkpoints" / str(step))
  assert train.main([*flags, f"--workdir={cut}"]) == 0
  chex.assert_trees_all_equal(*(checkpoints.load_run(workdir).params for workdir in (whole, cut)))
  rows = [[row for row in curve(workdir) if "train/loss" in row] for workdir in (whole, cut)]
  assert rows[0] == rows[1]
  return whole, rows[0]


@contextlib.contextmanager
def small_disk(folder, size: str):
  """A disk of that size, such as "1m", mounted at a new folder; skips where that is not allowed."""
  folder.mkdir()
  mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
                         capture_output=True)
  if mount.returncode:
    pytest.skip(f"mounting a small disk needs root: {mount.stderr.decode()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", str(folder)], check=True)
