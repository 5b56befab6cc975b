"""Checkpoints that are damaged, cannot be written, are cut short or belong to another run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import train
from trainer import checkpoints, sharding, store
from trainer.logging import read_metrics
from trainer.state import TrainState

ROOT = Path(__file__).parent.parent
SMOKE = "configs/vit.py:smoke"


def state_of(step, size=20_000):
  key = jax.random.key(step)
  params = {"a": jax.random.normal(key, (size,)), "b": jnp.arange(7.0) + step}
  return TrainState(jnp.int32(step), params, {"count": jnp.int32(step)}, {}, None)


def abstract(size=20_000):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      state_of(0, size))


def write(workdir, steps, **fields):
  store = checkpoints.Checkpoints(workdir, **fields)
  for step in steps:
    store.save(state_of(step), step)
  store.finish()
  store.close()


def files(workdir, step):
  return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["truncate", "delete", "flip"])
def test_a_damaged_file_is_never_used(how, tmp_path, caplog):
  """Whichever file of the newest is hit: it is read back whole, or skipped for the one before."""
  write(tmp_path / "run", [1, 2])
  skipped = 0
  for file in files(tmp_path / "run", 2):
    whole = file.read_bytes()
    if how == "delete":
      file.unlink()
    elif how == "truncate":
      file.write_bytes(whole[:len(whole) // 2])
    else:
      file.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255])
                       + whole[len(whole) // 2 + 1:])
    caplog.clear()
    store = checkpoints.Checkpoints(tmp_path / "run", read_only=True)
    state, _ = store.restore(abstract())
    store.close()
    chex.assert_trees_all_equal(state.params, state_of(int(state.step)).params)
    if int(state.step) == 1:
      skipped += 1
      assert f"{tmp_path}/run/checkpoints/2 is damaged" in caplog.text
    file.write_bytes(whole)
  assert skipped >= 3


def test_the_host_and_the_devices_sum_the_same_bits():
  rng = np.random.default_rng(0)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
  tree = {"f": jax.device_put(rng.normal(size=(6, 8)).astype(np.float32), split),
          **jax.device_put({
            "h": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16), "i": jnp.int32(-7),
            "b": jnp.array([True, False, True]), "w": jnp.arange(9, dtype=jnp.uint8)},
            sharding.replicated(mesh))}
  word = store.digest(tree)
  assert word == store._digest_on_host(tree)
  assert word == int(store._digest_on_device(tree))
  for name, x in tree.items():  # the last bit of any
    bits = np.array(x)
    bits.reshape(-1).view(np.uint8)[-1] ^= 1
    changed = tree | {name: jax.device_put(bits, x.sharding)}
    assert store.digest(changed) != word
    assert int(store._digest_on_device(changed)) != word


def test_all_damaged_is_an_error_and_a_damaged_one_is_written_over(tmp_path):
  write(tmp_path / "run", [1, 2])
  largest = [max(files(tmp_path / "run", step), key=lambda p: p.stat().st_size) for step in (1, 2)]
  largest[1].unlink()
  store = checkpoints.Checkpoints(tmp_path / "run")
  assert int(store.restore(abstract())[0].step) == 1
  store.save(state_of(2), 2)
  store.finish()
  store.close()
  store = checkpoints.Checkpoints(tmp_path / "run", read_only=True)
  assert int(store.restore(abstract())[0].step) == 2
  for file in (tmp_path / "run" / "checkpoints").rglob("*"):
    if file.is_file() and file.stat().st_size > 10_000:
      file.write_bytes(b"")
  with pytest.raises(checkpoints.CheckpointError, match=r"steps \[1, 2\] are damaged"):
    checkpoints.Checkpoints(tmp_path / "run", read_only=True).restore(abstract())


@pytest.fixture
def small_disk(tmp_path):
  with runs.small_disk(tmp_path / "disk", "1m") as folder:
    yield folder


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_full_disk_fails_the_save_and_spares_the_earlier_ones(on_error, small_disk, caplog):
  store = checkpoints.Checkpoints(small_disk, on_error=on_error, keep=None)
  store.save(state_of(1), 1)
  store.finish()
  if on_error == "raise":
    with pytest.raises(checkpoints.CheckpointError, match="(?s)step 2 could not be.*No space left"):
      store.save(state_of(2, 2_000_000), 2)
      store.finish()
  else:
    store.save(state_of(2, 2_000_000), 2)
    store.finish()
    assert "step 2 could not be written" in caplog.text and "goes on" in caplog.text
    store.save(state_of(3), 3)  # there is room for this one
    store.finish()
  left = [1] if on_error == "raise" else [1, 3]
  assert store.steps() == left
  store.close()
  assert {p.name for p in (small_disk / "checkpoints").iterdir()} == set(map(str, left))
  state, _ = checkpoints.Checkpoints(small_disk, read_only=True).restore(abstract())
  chex.assert_trees_all_equal(state.params, state_of(left[-1]).params)


def test_a_read_only_directory_fails_the_save(small_disk):
  store = checkpoints.Checkpoints(small_disk)
  store.save(state_of(1), 1)
  store.finish()
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  with pytest.raises(checkpoints.CheckpointError, match="step 2 could not be.*Read-only"):
    store.save(state_of(2), 2)
  assert store.steps() == [1]
  store.close()


def test_which_ones_stay(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  rows = [{"step": step, "eval/knn/top1": score} for step, score in
          [(1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2), (5, 0.4), (6, 0.1), (7, 0.2)]]
  (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  write(run, range(1, 8), keep=2, keep_every_steps=3, best="eval/knn/top1")
  assert checkpoints.Checkpoints(run, read_only=True).steps() == [2, 3, 6, 7]


@pytest.mark.parametrize("keep", [1, 3, 5, 9, None])
def test_the_newest_stay(tmp_path, keep):
  write(tmp_path, range(1, 8), keep=keep)
  stayed = checkpoints.Checkpoints(tmp_path, read_only=True).steps()
  assert stayed == [*range(1, 8)][-(keep or 7):]


def test_an_error_without_words_is_told_by_its_name(tmp_path, monkeypatch):
  write(tmp_path, [1, 2], keep=2)
  kept = checkpoints.Checkpoints(tmp_path, read_only=True)

  def restore(*args, **kwargs):
    raise AssertionError
  monkeypatch.setattr(kept.manager, "restore", restore)
  with pytest.raises(checkpoints.CheckpointError, match="is damaged: AssertionError"):
    kept.read(2, {})


def test_due_by_steps_and_by_minutes(tmp_path):
  by_steps = checkpoints.Checkpoints(tmp_path / "a", every_steps=3)
  assert [step for step in range(1, 10) if by_steps.due(step)] == [3, 6, 9]
  by_clock = checkpoints.Checkpoints(tmp_path / "b", every_minutes=1.0)
  assert not by_clock.due(5)
  by_clock.saved_at -= 61
  assert by_clock.due(5)
  assert not checkpoints.Checkpoints(tmp_path / "c").due(1000)


def test_other_data_is_refused(tmp_path, capsys):
  from PIL import Image
  for kind in ("one", "two"):
    (tmp_path / "images" / kind).mkdir(parents=True)
    for i in range(8):
      Image.new("L", (16, 16), 20 * i).save(tmp_path / "images" / kind / f"{i}.png")
  command = [f"--config={SMOKE}", f"--workdir={tmp_path / 'run'}", "--config.evals.classification="
             "none", f"--config.data.source=folder:{tmp_path / 'images'}",
             "--config.data.batch_size=8", "--config.eval_every_steps=0"]
  assert train.main(command) == 0
  Image.new("L", (16, 16), 255).save(tmp_path / "images" / "two" / "more.png")
  assert train.main(command) == 1
  assert "the data is not what" in capsys.readouterr().err


def run_command(workdir, data_dir, *flags):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "",
                 "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  return subprocess.Popen(
    [sys.executable, "train.py", f"--config={SMOKE}", f"--workdir={workdir}",
     f"--data_dir={data_dir}", *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True)


def wait_for_step(workdir, step, process):
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline and process.poll() is None:
    if any(row["step"] >= step for row in read_metrics(workdir)):
      return
    time.sleep(0.02)


KILLED = ["--config.total_steps=60", "--config.eval_every_steps=20", "--config.log_every_steps=1",
          "--config.checkpoint.every_steps=7", "--config.ema_decay=0.9"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unbroken")
  process = run_command(folder / "run", folder / "data", *KILLED)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  return folder


def same_run(a, b):
  assert runs.curve(a) == runs.curve(b)
  stores = [checkpoints.Checkpoints(x, read_only=True) for x in (a, b)]
  assert stores[0].steps()[-1] == stores[1].steps()[-1] == 60
  trees = [store.manager.restore(60, args=None) for store in stores]
  chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, [t[n] for n in ("params", "opt", "ema")])
                                for t in trees))


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(unbroken, tmp_path):
  """Killed three times, in training and around saves and evaluations, and continued each time."""
  for step in (9, 21, 43):
    process = run_command(tmp_path / "run", unbroken / "data", *KILLED)
    wait_for_step(tmp_path / "run", step, process)
    process.kill()
    process.communicate()
  process = run_command(tmp_path / "run", unbroken / "data", *KILLED)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  same_run(tmp_path / "run", unbroken / "run")


@pytest.mark.slow
def test_sigterm_saves_and_tells_how_to_continue(unbroken, tmp_path):
  process = run_command(tmp_path / "run", unbroken / "data", *KILLED)
  wait_for_step(tmp_path / "run", 10, process)
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == train.PREEMPTED, output
  step = checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()[-1]
  assert step >= 10 and f"stopped by SIGTERM after step {step} of 60" in output
  assert "continue with: python train.py --config=configs/vit.py:smoke" in output
  process = run_command(tmp_path / "run", unbroken / "data", *KILLED)
  assert process.communicate(timeout=300) and process.returncode == 0
  same_run(tmp_path / "run", unbroken / "run")
