"""A run's whole life: what ends it early saves first, and the same command goes on from there."""

import ast
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from runs import curve, small_disk
from tiers import suite

import train
from evaluators import classification
from input_pipeline import reading
from trainer import checkpoints, config, continued, lease, loop, preemption, recipe, same_run

ROOT = Path(__file__).parent.parent
SMOKE = "configs/vit.py:smoke"
RED_GREEN = {"red": (220, 30, 30), "green": (30, 200, 30)}


def paint(folder, count=16, splits=("train", "test"), suffix="png"):
  """Noisy images of two colours, a class each."""
  rng = np.random.default_rng(0)
  for split in splits:
    for name, colour in RED_GREEN.items():
      (folder / split / name).mkdir(parents=True, exist_ok=True)
      for i in range(count):
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (16, 16, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:02}.{suffix}")
  return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
  return paint(tmp_path_factory.mktemp("images") / "data")


def flags(source, *more):
  return [f"--config={SMOKE}", f"--config.data.source=folder:{source}",
          "--config.data.batch_size=8", "--config.augment.affine=none", *more]


def run(workdir, source, *more):
  return train.main([*flags(source, *more), f"--workdir={workdir}"])


@pytest.fixture(scope="session")
def whole(images, tmp_path_factory):
  """An unbroken run of six steps, evaluated at the third and the last."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  assert run(workdir, images) == 0
  return workdir


def same(a, b):
  assert curve(a) == curve(b)
  ours, theirs = map(checkpoints.load_run, (a, b))
  assert ours.step == theirs.step
  chex.assert_trees_all_equal(ours.params, theirs.params)


# --- Before the first step ------------------------------------------------------------------------

@pytest.mark.parametrize("name,said,message", [
  ("configs/mae.py:smoke", {"evals.knn.k": "100000"}, r"evals.knn.k=100000 must lie in 1..\d+"),
  ("configs/mae.py:smoke", {"evals.knn.k": "9", "evals.knn.limit": "8"}, "must lie in 1..8"),
  ("configs/mae.py:smoke", {"evals.knn.features": "logits"},
   "evals.knn.features = 'logits' needs the prediction 'logits', which this method has not"),
  ("configs/mae.py:smoke", {"evals.few_shot.shots": "(5, 500)"}, r"shots=\(5, 500\): a class has"),
  ("configs/mae.py:smoke", {"evals.reconstruction.prediction": "sample"}, "'sample'"),
  ("configs/clip.py:smoke", {"evals.retrieval.split": "tset"}, "did you mean 'test'"),
  ("configs/vit.py:smoke", {"evals.zero_shot.examples": "2"}, "needs the prediction 'embed_image'"),
  ("configs/vit.py:smoke", {"evals.mine.name": "captions"}, "evals.mine needs texts"),
  ("configs/diffusion.py:smoke", {"evals.samples.judge": "runs/gone"}, "'runs/gone' holds no run"),
  ("configs/diffusion.py:smoke", {"evals.samples.predictions": "('smaple',)"}, "'smaple'"),
])
def test_an_evaluation_that_cannot_be_is_refused_by_build(name, said, message, data_dir):
  made = recipe.load_config(name, said)
  with pytest.raises(ValueError, match=message):
    recipe.build(made, data_dir)


def test_no_split_to_evaluate_on_is_refused_by_build(tmp_path, capsys, caplog):
  paint(tmp_path / "data", splits=("",))
  whole = "--config.data.held_out=none"  # else a share of the one split is evaluated on
  assert run(tmp_path / "run", tmp_path / "data", whole, "--config.own_data=false") == 1
  error = capsys.readouterr().err
  assert "the data has no split to evaluate on (test, val, validation)" in error
  assert "--config.data.eval_split=train, or --config.evals.classification=none" in error
  assert not (tmp_path / "run").exists()
  assert run(tmp_path / "run", tmp_path / "data", whole, "--config.total_steps=2") == 0
  assert "classification is left out" in caplog.text  # the recipe's own, which no flag asks for


def test_the_rarest_class_is_counted_where_records_are_in_memory(tmp_path):
  paint(tmp_path / "data")
  for path in sorted((tmp_path / "data/train/red").iterdir())[3:]:
    path.unlink()
  said = {"data.source": f"folder:{tmp_path}/data", "data.batch_size": "8",
          "augment.affine": "none", "evals.few_shot.shots": "(4,)"}
  with pytest.raises(ValueError, match="a class has only 3 of the 19 training examples"):
    recipe.build(recipe.load_config(SMOKE, said))
  recipe.build(recipe.load_config(SMOKE, said | {"evals.few_shot.shots": "(3,)"}))


# --- Ended, but not lost --------------------------------------------------------------------------

def test_a_bad_record_saves_first_and_skipping_goes_on(tmp_path, capsys):
  """It goes on as the run that skipped from the start."""
  data = paint(tmp_path / "data", count=20, suffix="jpg")
  bad = data / "train/green/07.jpg"
  bad.write_bytes(bad.read_bytes()[:-20])
  more = ["--config.data.cache_bytes=0", "--config.log_every_steps=1", "--config.total_steps=10",
          "--config.eval_every_steps=0"]
  assert run(tmp_path / "skips", data, *more, "--config.data.on_error=skip") == 0
  capsys.readouterr()
  assert run(tmp_path / "run", data, *more) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  step = checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()[-1]
  assert step == 3  # the fourth batch of seed 0 has it
  assert error.startswith("error: ") and "green/07.jpg" in error
  assert f"step {step} is saved in" in error
  assert error.endswith("(or --config.data.on_error=skip)")
  assert run(tmp_path / "run", data, *more, "--config.data.on_error=skip") == 0
  assert f"continuing from step {step}" in capsys.readouterr().out
  same(tmp_path / "run", tmp_path / "skips")
  assert run(tmp_path / "held", data, *more[1:]) == 1  # in memory it is met before the first step
  assert capsys.readouterr().err.strip().endswith("(or --config.data.on_error=skip)")


@pytest.mark.parametrize("error", suite([
  RuntimeError("out of luck"), ValueError("no such thing"),
  OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png")], 2))
def test_an_evaluator_s_error_saves_first(error, images, whole, tmp_path, monkeypatch, capsys):
  def savefig(*args, **kwargs):
    raise error
  with monkeypatch.context() as patch:
    patch.setattr(Figure, "savefig", savefig)
    assert run(tmp_path / "run", images) == 1
  last = capsys.readouterr().err.strip().splitlines()[-1]
  assert last.startswith("error: evaluation at step 6: ") and str(error) in last
  assert "step 6 is saved in" in last and "(or --config.evals.classification=none)" in last
  assert run(tmp_path / "run", images) == 0
  same(tmp_path / "run", whole)


def test_an_error_of_the_loop_saves_first(images, whole, tmp_path, monkeypatch, capsys, caplog):
  """A full disk at a log step, of which the checkpoint still goes where there is room."""
  write = loop.Reporter.write

  def fails(self, step, metrics):
    if step == 4 and not failed:
      failed.append(step)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    write(self, step, metrics)
  failed = []
  monkeypatch.setattr(loop.Reporter, "write", fails)
  assert run(tmp_path / "run", images) == 1
  last = capsys.readouterr().err.strip().splitlines()[-1]
  assert last.startswith("error: ") and "No space left on device" in last
  assert "is saved in" in last
  step = checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()[-1]
  assert step in (4, 5)
  assert run(tmp_path / "run", images) == 0
  ours, theirs = map(checkpoints.load_run, (tmp_path / "run", whole))
  chex.assert_trees_all_equal(ours.params, theirs.params)


def test_nothing_that_is_not_finite_is_saved(images, tmp_path, monkeypatch, capsys):
  """Not by what ends the run before the loss was looked at, either."""
  count = []

  def next_batch(self):
    if len(count) == 3:
      raise OSError("the data went away")
    count.append(0)
    return original(self)
  original = loop.Training.next_batch
  monkeypatch.setattr(loop.Training, "next_batch", next_batch)
  assert run(tmp_path / "run", images, "--config.optimizer.lr=1e30", "--config.log_every_steps=100",
             "--config.optimizer.name=sgd", "--config.optimizer.ns_steps=none",
             "--config.schedule.name=constant", "--config.schedule.warmup_steps=0",
             "--config.eval_every_steps=0") == 1
  error = capsys.readouterr().err
  assert "the data went away" in error and "not finite" in error and "nothing is saved" in error
  assert not checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()


@pytest.mark.slow
def test_a_full_disk_at_the_last_step_is_one_line(images, tmp_path):
  with small_disk(tmp_path / "disk", "300k") as disk:
    done = subprocess.run([sys.executable, "train.py", *flags(images), f"--workdir={disk}/run"],
                          cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment())
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 1 and len(lines) == 1, done.stderr[-2000:]
  assert lines[0].startswith("error: checkpoint of step 6 could not be written to ")
  assert "No space left on device" in lines[0]


# --- Signals --------------------------------------------------------------------------------------

def environment(**more):
  return {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "",
          "XLA_FLAGS": "--xla_force_host_platform_device_count=1", **more}


@pytest.mark.parametrize("at", suite([3, 6], 0))
def test_sigterm_in_an_evaluation_is_heard(at, images, whole, tmp_path, monkeypatch, capsys):
  def evaluate(context, **fields):
    if context.step == at:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(30)
    return original(context, **fields)
  original = classification.evaluate
  with monkeypatch.context() as patch:
    patch.setattr(classification, "evaluate", evaluate)
    patch.delattr(classification, "check")
    began = time.monotonic()
    assert run(tmp_path / "run", images) == train.PREEMPTED
  assert time.monotonic() - began < 25
  error = capsys.readouterr().err
  assert f"stopped by SIGTERM in the evaluation at step {at}; step {at} is saved" in error
  assert "continue with: python train.py" in error
  assert run(tmp_path / "run", images) == 0
  same(tmp_path / "run", whole)


def test_sigterm_in_preparation_stops_before_the_first_step(images, tmp_path, monkeypatch, capsys):
  def load(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    return original(*args)
  original = reading.load
  monkeypatch.setattr(reading, "load", load)
  assert run(tmp_path / "run", images) == train.PREEMPTED
  assert "stopped by SIGTERM before the run began" in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert not (tmp_path / "run" / lease.NAME).exists()


DEEP = """
import os, signal, sys, threading
import jax
import train
from evaluators import classification
from input_pipeline import reading

def deep(*args, **kwargs):
  threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
  threading.Timer(100, os._exit, (3,)).start()
  # Minutes in one call, from which no exception comes out.
  jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: x @ x, jax.numpy.eye(64)).block_until_ready()

if sys.argv[1] == "load":
  reading.load = deep
else:
  del classification.check
  classification.evaluate = lambda context, pairs=0: deep()
train.leave(train.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where,says", [
  ("load", "before the run began"),
  ("evaluate", "in the evaluation at step 3; step 3 is saved")])
def test_sigterm_is_heard_where_python_does_not_run(where, says, images, tmp_path):
  began = time.monotonic()
  done = subprocess.run([sys.executable, "-c", DEEP, where, *flags(images),
                         f"--workdir={tmp_path}/run"], cwd=ROOT, env=environment(),
                        capture_output=True, text=True, timeout=200)
  assert done.returncode == train.PREEMPTED, done.stderr[-2000:]
  assert f"stopped by SIGTERM {says}" in done.stderr and "continue with: " in done.stderr
  assert time.monotonic() - began < 100
  steps = checkpoints.Checkpoints(tmp_path / "run", read_only=True).steps()
  assert steps == ([3] if where == "evaluate" else [])
  if where == "evaluate":
    assert run(tmp_path / "run", images) == 0  # the dead process's lease is no hindrance


def test_what_cannot_be_a_run_directory_is_named(smoke_run, data_dir, tmp_path, capsys):
  broken = shutil.copytree(smoke_run("vit"), tmp_path / "run")
  (broken / "config.json").write_text("{")
  (tmp_path / "file").write_text("")
  for workdir, said in ((broken, "run/config.json can not be read: "), (
      tmp_path / "file", "file is a file: a run needs a folder of its own")):
    assert train.main([f"--config={SMOKE}", f"--data_dir={data_dir}", f"--workdir={workdir}"]) == 1
    assert said in capsys.readouterr().err


# --- One writer -----------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lease, "RENEW", 0.1)
  monkeypatch.setattr(lease, "DEAD", 0.8)


def holder(**fields):
  """What a lease of a process that is no more says."""
  gone = subprocess.Popen(["true"])
  gone.wait()
  return {"host": "here", "pid": gone.pid, "since": "then", "token": "t", "machine":
          lease.machine(), "born": "1", "sign_of_life": "0" * 12, **fields}


def test_a_second_process_is_refused(images, tmp_path, capsys):
  with lease.hold(tmp_path / "run") as own:
    assert run(tmp_path / "run", images) == 1
    error = capsys.readouterr().err
    assert f"run is being written by process {os.getpid()} on " in error
    assert f"since {own.since}" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == [lease.NAME]
  assert not (tmp_path / "run").exists()


def test_the_dead_do_not_hold(tmp_path):
  """One whose number is free, and one whose number another process has now."""
  for said in (holder(), holder(pid=1, born="0"), holder(pid=os.getpid())):
    (tmp_path / lease.NAME).write_text(json.dumps(said), encoding="utf-8")
    with lease.hold(tmp_path) as own:
      assert lease.read(tmp_path / lease.NAME)["token"] == own.token
      assert [path.name for path in tmp_path.iterdir()] == [lease.NAME]
    assert not (tmp_path / lease.NAME).exists()
    tmp_path.mkdir(exist_ok=True)


@pytest.mark.parametrize("renewed", [True, False])
def test_another_machine_is_watched(renewed, tmp_path, quick):
  path = tmp_path / lease.NAME
  path.write_text(json.dumps(holder(machine="there", host="there")), encoding="utf-8")
  ended = threading.Event()

  def renew():
    while renewed and not ended.wait(0.1):
      said = holder(machine="there", host="there", sign_of_life=f"{time.time_ns():020}")
      path.with_suffix(".new").write_text(json.dumps(said), encoding="utf-8")
      path.with_suffix(".new").replace(path)
  thread = threading.Thread(target=renew)
  thread.start()
  try:
    if renewed:
      with pytest.raises(lease.InUse, match="process .* on there since then"):
        lease.Lease(tmp_path)
    else:
      lease.Lease(tmp_path).release()
  finally:
    ended.set()
    thread.join()


@pytest.mark.parametrize("chained", [False, True])
def test_one_of_many_follows_the_dead(chained, tmp_path):
  """Also where one that was about to follow has died."""
  for turn in range(30):
    workdir, won, refused = tmp_path / str(turn), [], []
    workdir.mkdir()
    (workdir / lease.NAME).write_text(json.dumps(holder(pid=2**22 + 1)), encoding="utf-8")
    if chained:
      (workdir / f"{lease.NAME}.after.t").write_text(
        json.dumps(holder(pid=2**22 + 1, token="u")), encoding="utf-8")
    barrier = threading.Barrier(6)

    def take(workdir=workdir, barrier=barrier, won=won, refused=refused):
      barrier.wait()
      try:
        won.append(lease.Lease(workdir))
      except lease.InUse:
        refused.append(1)
    threads = [threading.Thread(target=take) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(won) == 1 and len(refused) == 5
    assert lease.read(workdir / lease.NAME)["token"] == won[0].token
    assert [path.name for path in workdir.iterdir()] == [lease.NAME]
    won[0].release()


def test_a_lease_is_renewed_and_its_loss_is_seen(tmp_path, quick):
  with lease.hold(tmp_path) as own:
    before = lease.read(tmp_path / lease.NAME)
    time.sleep(0.5)
    after = lease.read(tmp_path / lease.NAME)
    assert after["sign_of_life"] > before["sign_of_life"] and after["token"] == before["token"]
    (tmp_path / lease.NAME).unlink()  # by somebody's hand
    time.sleep(0.5)
    assert lease.read(tmp_path / lease.NAME)["token"] == own.token
    (tmp_path / lease.NAME).write_text(json.dumps(holder(host="there")), encoding="utf-8")
    time.sleep(0.5)
    assert "on there" in own.lost
  assert lease.read(tmp_path / lease.NAME)["host"] == "there"  # not ours to remove


# --- Moves and other lengths ----------------------------------------------------------------------

def test_moved_data_and_a_moved_run_are_the_same_run(images, whole, tmp_path, monkeypatch, capsys):
  shutil.copytree(images, tmp_path / "other/place")
  shutil.copytree(whole, tmp_path / "moved")
  monkeypatch.chdir(tmp_path / "other")
  before = (tmp_path / "moved/config.json").read_text(encoding="utf-8")
  assert run(tmp_path / "moved", "place") == 0  # relative, and configs/ is not here
  assert "continuing from step 6" in capsys.readouterr().out
  assert (tmp_path / "moved/config.json").read_text(encoding="utf-8") == before
  next((tmp_path / "other/place/train/red").iterdir()).unlink()
  assert run(tmp_path / "moved", "place") == 1
  error = capsys.readouterr().err
  assert "the data is not what" in error and f"folder:{images}" in error


def test_moved_data_before_the_first_checkpoint(images, tmp_path, capsys):
  shutil.copytree(images, tmp_path / "place")
  built = recipe.build(recipe.load_config(SMOKE, dict(
    flag.removeprefix("--config.").split("=") for flag in flags(images)[1:])))
  same_run.check_same_run(tmp_path / "run", recipe.plain(built.config), built)
  same_run.keep_facts(tmp_path / "run", built.data.info)
  next((images / "train/red").iterdir())
  assert run(tmp_path / "run", tmp_path / "place", "--config.total_steps=7") == 1
  assert "config.total_steps: 6 -> 7" in capsys.readouterr().err
  assert run(tmp_path / "run", tmp_path / "place") == 0
  shutil.rmtree(tmp_path / "run/checkpoints")
  next((tmp_path / "place/train/red").iterdir()).unlink()
  assert run(tmp_path / "run", tmp_path / "place") == 1
  assert "config.data.source: " in capsys.readouterr().err


@pytest.mark.slow
def test_where_a_run_began_from_does_not_matter_any_more(images, whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path / "first")
  command = ["--config=configs/finetune.py:smoke", f"--config.data.source=folder:{images}",
             "--config.data.batch_size=8", f"--workdir={tmp_path}/run",
             "--config.augment.affine=none", "--config.eval_every_steps=0"]
  status = train.main([*command, f"--config.init={tmp_path}/first"])
  assert status == 0, capsys.readouterr().err
  (tmp_path / "first").rename(tmp_path / "elsewhere")
  for there in ("first", "elsewhere"):
    assert train.main([*command, f"--config.init={tmp_path}/{there}"]) == 0
    assert "continuing from step" in capsys.readouterr().out
  assert train.main([*command, f"--config.init={tmp_path}/first", "--config.optimizer.lr=1"]) == 1
  assert "config.optimizer.lr" in capsys.readouterr().err
  assert train.main([*command[:3], f"--workdir={tmp_path}/new",
                     f"--config.init={tmp_path}/first"]) == 1


CONSTANT = ["--config.schedule.name=constant", "--config.eval_every_steps=0"]


def test_more_steps_of_a_finished_run(images, tmp_path, capsys):
  assert run(tmp_path / "run", images, *CONSTANT) == 0
  assert run(tmp_path / "run", images, *CONSTANT, "--config.total_steps=9") == 0
  assert "continuing from step 6" in capsys.readouterr().out
  assert json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))["total_steps"] == 9
  assert run(tmp_path / "long", images, *CONSTANT, "--config.total_steps=9") == 0
  ours, theirs = map(checkpoints.load_run, (tmp_path / "run", tmp_path / "long"))
  assert ours.step == theirs.step == 9
  chex.assert_trees_all_equal(ours.params, theirs.params)
  assert run(tmp_path / "run", images, *CONSTANT, "--config.total_steps=8") == 1
  assert "it has taken 9 steps already" in capsys.readouterr().err


@pytest.mark.slow
def test_more_steps_where_the_past_would_be_another(whole, images, capsys):
  before = (whole / "config.json").read_text(encoding="utf-8")
  assert run(whole, images, "--config.total_steps=12") == 1
  error = capsys.readouterr().err
  assert "total_steps = 6" in error and "at step 4 its rate was" in error
  assert f"--config.init={whole} --config.init.source= --config.init.fresh=none" in error
  assert run(whole.parent / "longer", images, "--config.total_steps=12",
             f"--config.init={whole}", "--config.init.source=", "--config.init.fresh=none") == 0
  assert (whole / "config.json").read_text(encoding="utf-8") == before


def test_more_steps_of_a_method_that_counts_them():
  made = recipe.load_config("configs/moco.py:smoke", {"schedule.name": "constant"})
  built = recipe.build(made, data=recipe.stand_in(made))
  then = recipe.plain(built.config) | {"total_steps": 5}
  with pytest.raises(continued.TrainingError, match="method moco looks at how long the run is"):
    continued.check_length(Path("run"), then, built, 5)


def test_a_config_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.load_config("configs/vit.py:smoke").config_name == "vit:smoke"
  assert config.load_config(f"{ROOT}/configs/vit.py").config_name == "vit"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/vit.py").write_text(
    "VARIANTS = ('',)\ndef get_config(variant):\n  from configs.base import get_base\n"
    "  return get_base()\n", encoding="utf-8")
  assert config.load_config("configs/vit.py").method.to_dict() == {}  # what is here goes before
  with pytest.raises(ValueError, match="did you mean 'configs/mae.py'"):
    config.load_config("configs/mea.py")


# --- Files ----------------------------------------------------------------------------------------

def test_every_text_file_is_said_to_be_utf8():
  paths = {*ROOT.glob("*.py"), *(path for room in ("trainer", "evaluators", "interop")
                                 for path in (ROOT / room).glob("**/*.py"))}
  wrong = []
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.Call):
        continue
      name = getattr(node.func, "attr", getattr(node.func, "id", ""))
      mode = next((a.value for a in node.args if isinstance(a, ast.Constant)), "")
      asks = name in ("read_text", "write_text") or name == "open" and "b" not in str(mode)
      known = any(k.arg == "encoding" for k in node.keywords) or mode in ("utf-8", "ascii")
      of_zip = getattr(getattr(node.func, "value", None), "id", "") == "archive"
      if asks and not known and not of_zip:
        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
  assert not wrong


@pytest.mark.slow
def test_names_in_any_script_in_a_locale_of_ascii(tmp_path):
  data = paint(tmp_path / "data")
  for split in ("train", "test"):
    (data / split / "red").rename(data / split / "rød")
    (data / split / "green").rename(data / split / "緑")
  done = subprocess.run(
    [sys.executable, "train.py", *flags(data), f"--workdir={tmp_path}/run"], cwd=ROOT,
    capture_output=True, timeout=300, env=environment(
      PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0"))
  assert done.returncode == 0, done.stderr[-2000:]
  names = checkpoints.load_run(tmp_path / "run").class_names
  assert sorted(names) == ["rød", "緑"]
  assert jax.tree.leaves(checkpoints.load_run(tmp_path / "run").params)


def test_a_stop_that_a_library_makes_an_error_of_is_a_stop():
  def evaluation():
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(30)
    finally:
      raise AssertionError("the tracer that was left is not the one that was entered")

  with contextlib.closing(preemption.Signals()) as signals:
    with pytest.raises(AssertionError):  # nobody asked to stop
      signals.at_once(lambda: (_ for _ in ()).throw(AssertionError()), str)
    with pytest.raises(preemption.Preempted, match="SIGTERM"):
      signals.at_once(evaluation, str)


def test_signals_puts_everything_back():
  former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  signals = preemption.Signals()
  assert signals.at_once(lambda: 3, str) == 3
  signals.close()
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former
