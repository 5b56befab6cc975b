"""Two processes of two devices each against one process, and going over from one to the other."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest

from trainer import checkpoints
from trainer.logging import read_metrics

ROOT = Path(__file__).parent.parent
FLAGS = ["--config=configs/mae.py:smoke", "--config.log_every_steps=1", "--config.total_steps=8",
         "--config.checkpoint.every_steps=4", "--config.checkpoint.keep=none",
         "--config.optimizer.name=sgd", "--config.optimizer.b2=none", "--config.optimizer.lr=0.1"]


def start(workdir, data_dir, *flags, devices=2):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "",
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
                              "--xla_cpu_collective_call_terminate_timeout_seconds=600"}
  return subprocess.Popen(
    [sys.executable, "train.py", *FLAGS, f"--workdir={workdir}", f"--data_dir={data_dir}", *flags],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes, status=0):
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [status] * len(processes), outputs
  return outputs


def pair(workdir, data_dir, *flags):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [start(workdir, data_dir, f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
                f"--process_id={i}", *flags) for i in range(2)]


def losses(workdir):
  return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  finish([start(folder / "one", folder / "data", devices=1)])
  outputs = finish(pair(folder / "two", folder / "data", "--config.mesh.fsdp=2"))
  return folder, outputs


def close(a, b):
  assert sorted(a) == sorted(b)
  np.testing.assert_allclose([a[s] for s in sorted(a)], [b[s] for s in sorted(a)], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(runs):
  folder, outputs = runs
  one, two = losses(folder / "one"), losses(folder / "two")
  assert sorted(two) == list(range(1, 9))
  close(one, two)
  evaluations = [[row for row in read_metrics(folder / run) if "eval/knn/top1" in row]
                 for run in ("one", "two")]
  assert len(evaluations[0]) == len(evaluations[1]) == 3
  np.testing.assert_allclose(*[[row["eval/knn/top1"] for row in rows] for rows in evaluations],
                             atol=0.02)
  assert "step 8/8" in outputs[0] and "step 8/8" not in outputs[1]  # one process tells


@pytest.mark.slow
@pytest.mark.parametrize("source", ["one", "two"])
def test_continued_by_another_number_of_processes(runs, source, tmp_path):
  folder, _ = runs
  shutil.copytree(folder / source, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
  if source == "one":
    finish(pair(tmp_path / "run", folder / "data"))
  else:
    finish([start(tmp_path / "run", folder / "data", devices=1)])
  close(losses(tmp_path / "run"), losses(folder / "one"))
  a, b = (checkpoints.load_run(path).params for path in (tmp_path / "run", folder / "one"))
  chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_processes_that_disagree_are_told(runs, tmp_path):
  processes = pair(tmp_path / "run", runs[0] / "data")
  processes[1].kill()
  processes[1].communicate()
  port = next(a for a in processes[0].args if a.startswith("--coordinator"))
  processes[1] = start(tmp_path / "run", runs[0] / "data", port, "--num_processes=2",
                       "--process_id=1", "--config.seed=5")
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert all(process.returncode not in (0, 75) for process in processes)
  assert "processes do not agree on the config: [1] differ" in outputs[0] + outputs[1]


@pytest.mark.slow
def test_preempted_together(runs, tmp_path):
  processes = pair(tmp_path / "run", runs[0] / "data", "--config.total_steps=100000",
                   "--config.eval_every_steps=0", "--config.checkpoint.every_steps=none")
  deadline = time.monotonic() + 200
  while not losses(tmp_path / "run") and time.monotonic() < deadline:
    time.sleep(0.5)
  processes[1].send_signal(signal.SIGTERM)
  outputs = finish(processes, status=75)
  saved = checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()
  assert len(saved) == 1 and f"after step {saved[0]:,} of 100,000" in outputs[0]
  assert "continue with: python train.py" in outputs[0]
