"""The cases of benchmarks/bad_inputs.py, of a kind each."""

import pickle
import shutil
import signal

import numpy as np
from PIL import Image

from benchmarks.bad_input_parts import (
  STOPPED,
  Case,
  cut_jpeg,
  damaged,
  field,
  finished,
  has_step,
  on_disk,
  other_program,
  paint,
  pairs,
  plain,
  put,
  run,
  signalled,
  trained,
  two_at_once,
  wait_for,
)

STREAM = "--config.data.cache_bytes=0"
CLIP = "configs/clip.py:smoke"
OTHER = "--config.optimizer.lr=0.5"
DIVERGES = ("--config.optimizer.lr=1e30", "--config.optimizer.name=sgd",
            "--config.optimizer.ns_steps=none", "--config.schedule.name=constant",
            "--config.schedule.warmup_steps=0", "--config.checkpoint.every_steps=1")


class Bomb:
  """Writes a file where it is unpickled."""

  def __reduce__(self):
    return exec, ("open('/tmp/bad_inputs_executed', 'w')",)


def renamed(folder):
  """A run whose data then lacks a class that it has by another name."""
  trained(folder)
  for split in ("train", "test"):
    (folder / "data" / split / "red").rename(folder / "data" / split / "rde")


def more_data(folder):
  trained(folder)
  shutil.copy(folder / "data/train/red/00.png", folder / "data/train/red/more.png")


def broken_config(folder):
  trained(folder)
  (folder / "run/config.json").write_text("{")


def weights_of_other_shape(folder):
  trained(folder)
  (folder / "run").rename(folder / "source")


def captions(**form):
  return lambda folder: pairs(folder / "data", **form)


def utf16(folder):
  pairs(folder / "data", encoding="utf-16")


def linked(folder):
  paint(folder / "elsewhere", splits=("",), classes=("red",))
  paint(folder / "data", classes=("green",))
  for split in ("train", "test"):
    (folder / "data" / split / "red").symlink_to(folder / "elsewhere/red")


def deep(folder):
  for name in "ab":
    paint(folder / "data/train" / name, splits=("day", "night"))


def looks_like_splits(folder):
  paint(folder / "data", splits=("train", "holdout"))


def no_split(folder):
  paint(folder / "data", splits=("",))


def names_of(*classes):
  return lambda folder: paint(folder / "data", classes=classes)


def twice(folder, _):
  """A run that is stopped at once, by a second signal."""
  process = run(folder, ["--config.total_steps=2000"], wait=False)
  wait_for(process, lambda: has_step(folder / "run"))
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGTERM)
  return finished(process)


CONFIG = [
  Case("config", "a recipe that there is not", ("--config=configs/vti.py",),
       "did you mean 'configs/vit.py'", plain),
  Case("config", "a variant that there is not", ("--config=configs/vit.py:smoek",),
       "did you mean 'smoke'", plain),
  field("optimzer.lr=1", "did you mean 'optimizer'"),
  field("optimizer.lr=abc", "expected float"),
  field("optimizer.weight_decy=1", "did you mean 'weight_decay'"),
  field("optimizer.name=adamv", "did you mean 'adamw'"),
  field("optimizer.batch_size=256", "optimizer.batch_size"),
  field("model.dept=3", "did you mean 'depth'"),
  field("model.heads=3", "heads = 3 does not divide"),
  field("model.activation=gelo", "did you mean 'gelu'"),
  field("total_steps=0", "at least one step"),
  field("schedule.warmup_steps=100", "longer than the run"),
  field("ema_decay=1.0", "ema_decay"),
  field("augment.crop_area=(0,2)", "augment.crop_area"),
  field("checkpoint.kep=3", "did you mean 'keep'"),
  field("mesh.data=3", "must multiply to the 2 devices", "devices"),
  field("data.batch_size=7", "is not a multiple of 2", "devices"),
  field("accumulate=3", "is not a multiple of", "devices"),
]
EVALUATION = [
  field("evals.knn.k=100000", "evals.knn.k=100000 must lie in", "evaluation"),
  field("evals.knn.k=abc", "expected int", "evaluation"),
  field("evals.knn.kk=3", "did you mean 'k'", "evaluation"),
  field("evals.nothing.k=3", "evals.nothing", "evaluation"),
  field("evals.few_shot.shots=(5,500)", "a class has only 16", "evaluation"),
  field("evals.retrieval.examples=2", "embed_image|texts", "evaluation"),
  field("data.eval_split=vaildation", "did you mean|allowed", "evaluation"),
]
FOLDERS = [
  Case("folder", "none at the path", ("--config.data.source=folder:{}/dta",), "dta", plain),
  Case("folder", "an empty one", (), "no images|holds no", lambda folder: (
    folder / "data").mkdir()),
  Case("folder", "a file in its place", ("--config.data.source=folder:{}/data/train/red/00.png",),
       "00.png", plain),
  Case("folder", "a source that there is not", ("--config.data.source=fodler:{}/data",),
       "did you mean 'folder", plain),
  Case("folder", "what only looks like splits", (), "named like splits", looks_like_splits),
  Case("folder", "images in folders below their class's", (), "", deep, 0, "steps 6"),
  Case("folder", "links that lead out of it", (), "data.follow_links", linked),
  Case("folder", "one split alone, evaluated on a share", (), "", no_split, 0, "steps 6"),
]
IMAGES = [
  Case("image", "cut short", (), r"00.png", put("data/train/red/00.png", b"\x89PNG\r\n\x1a\n0000")),
  Case("image", "of no bytes", (), "00.png", put("data/train/red/00.png", b"")),
  Case("image", "a text that is called .jpg", (), "x.jpg", put("data/train/red/x.jpg", "text")),
  Case("image", "TIFF of real numbers", (), "x.tif", put("data/train/red/x.tif", Image.fromarray(
    np.full((16, 16), 0.5, np.float32)))),
  Case("image", "grey ones among coloured ones", (), "", put(
    "data/train/red/x.png", Image.new("L", (16, 16), 90)), 0, "steps 6"),
  Case("image", "a thumbnail of a file manager", (), "", put(
    "data/train/red/Thumbs.db", "x"), 0, "steps 6"),
  Case("image", "a bad one in the middle of a run", (STREAM, "--config.total_steps=10"),
       r"07.jpg.*step \d+ is saved in .*on_error=skip", cut_jpeg, 1, r"steps \d"),
  Case("image", "the same, skipped", (STREAM, "--config.data.on_error=skip"), "", cut_jpeg, 0,
       "steps 6"),
]
METADATA = [
  Case("metadata", "no column file_name", (), "file_name", captions(header="name,text"),
       config=CLIP),
  Case("metadata", "semicolons", (), ";|semicolon|file_name", captions(
    header="file_name;text", row="{}.png;picture {}"), config=CLIP),
  Case("metadata", "UTF-16", (), "UTF-|utf", utf16, config=CLIP),
  Case("metadata", "a row of a file that there is not", (), "gone_00.png", captions(
    row="gone_{}.png,a picture {}"), config=CLIP),
  Case("metadata", "an empty text", (), "empty", captions(row="{}.png,"), config=CLIP),
  Case("metadata", "a row too short", (), "metadata.csv", captions(row="{}.png"), config=CLIP),
  Case("metadata", "no rows", (), "metadata.csv", lambda folder: [
    (paint(folder / "data", splits=(split,), classes=("",)) / split / "metadata.csv").write_text(
      "file_name,text\n") for split in ("train", "test")], config=CLIP),
  Case("metadata", "pairs for a recipe that needs labels", (), "label|class", captions()),
]
RUNS = [
  Case("run directory", "of another config", (OTHER, "--config.checkpoint.every_steps=3"),
       "config.optimizer.lr", trained, 1, "steps 3, 6|steps 6"),
  Case("run directory", "whose config is no JSON", (), "config.json", broken_config, 1,
       ".*"),
  Case("run directory", "a file in its place", (), "is a file", put("run", "x")),
  Case("run directory", "whose data has changed", ("--config.checkpoint.every_steps=3",),
       "the data is not what", more_data, 1, "steps 3, 6|steps 6"),
  Case("run directory", "the newest checkpoint cut short", ("--config.checkpoint.every_steps=3",),
       "", damaged(6), 0, "steps 3, 6"),
  Case("run directory", "all checkpoints cut short", ("--config.checkpoint.every_steps=3",),
       "no checkpoint in .* is whole", damaged(3, 6), 1, "no checkpoint|steps .*"),
]
WEIGHTS = [
  field("init.run=nowhere", "nowhere holds no run", "weights"),
  Case("weights", "of another width", ("--config.init.run={}/source", "--config.model.width=64"),
       "does not fit|width|mlp|shape", weights_of_other_shape),
  Case("weights", "a pickle that would write a file", (), "", put(
    "bomb.pth", pickle.dumps({"state_dict": Bomb()})), command=other_program(
      "convert.py", "--from={}/bomb.pth", "--to={}/new")),
  Case("weights", "safetensors cut short", (), "", put("w.safetensors", b"\x10" * 40),
       command=other_program("convert.py", "--from={}/w.safetensors", "--to={}/new")),
]
EVENTS = [
  Case("signal", "SIGTERM in training", (), "stopped by SIGTERM (after|in the evaluation at) step",
       plain, STOPPED, r"steps [\d, ]+", signalled(signal.SIGTERM, has_step)),
  Case("signal", "SIGINT in training", (), "stopped by SIGINT (after|in the evaluation at) step",
       plain, STOPPED, r"steps [\d, ]+", signalled(signal.SIGINT, has_step)),
  Case("signal", "both at once", (), "stopped by SIG", plain, STOPPED, r"steps [\d, ]+", twice),
  Case("signal", "SIGTERM before the first step", (), "stopped by SIGTERM", plain, STOPPED,
       "no run|no checkpoint|steps [0-9]+",
       signalled(signal.SIGTERM, lambda workdir: (workdir / "in_use.json").exists())),
  Case("signal", "SIGKILL, and the same command", (), "", plain, 0, "steps [0-9]+, 30|steps 30",
       signalled(signal.SIGKILL, lambda workdir: has_step(workdir, 12), "--config.total_steps=30",
                 "--config.log_every_steps=1", "--config.checkpoint.every_steps=5",
                 then=("--config.total_steps=30", "--config.log_every_steps=1",
                       "--config.checkpoint.every_steps=5"))),
  Case("disk", "full at the last step", (), "could not be written .*No space left", plain, 1,
       "no checkpoint", on_disk("300k")),
  Case("disk", "full at a later checkpoint", (), "No space left", plain, 1, r"steps [\d, ]+",
       on_disk("1600k", "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=none")),
  Case("disk", "read-only", (), "Read-only", plain, 1, "no run", on_disk("1m", read_only=True)),
  Case("concurrency", "a second process on the same workdir", (), "is being written by process",
       plain, 1, r"steps [\d, ]+", two_at_once),
  Case("locale", "names of classes in ASCII's locale", (), "", names_of("été", "снег"), 0,
       "steps 6", lambda folder, flags: run(folder, flags, environment={
         "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items())),
  Case("numbers", "a loss that is not finite", DIVERGES, "not finite at step", plain, 1,
       r"steps [\d, ]+"),
]
COMMANDS = [
  Case("evaluate.py", "no run", (), "nowhere holds no run", command=other_program(
    "evaluate.py", "--workdir=nowhere")),
  Case("evaluate.py", "an evaluation that cannot be", (), "evals.knn.k=0", trained, 1, "steps .*",
       other_program("evaluate.py", "--workdir={}/run", "--config.evals.knn.k=0")),
  Case("evaluate.py", "no such images", (), "no such file|needs a run on images", trained, 1,
       "steps .*", other_program(
    "evaluate.py", "--workdir={}/run", "--images={}/*.gif", "--zero_shot.classes=a,b")),
  Case("evaluate.py", "a class that the run has not", (), "did you mean 'red'", renamed, 1,
       "steps .*", other_program("evaluate.py", "--workdir={}/run")),
  Case("evaluate.py", "words for a run that has none", (), "embed_text|texts|zero", trained, 1,
       "steps .*", other_program(
         "evaluate.py", "--workdir={}/run", "--images={}/data/test/red/*.png",
         "--zero_shot.classes=red,green")),
  Case("plan.py", "a topology that there is not", (), "expected cpu:N", command=other_program(
    "plan.py", f"--config={CLIP}", "--topology=v5x:4x4")),
]
CASES = [*CONFIG, *EVALUATION, *FOLDERS, *IMAGES, *METADATA, *RUNS, *WEIGHTS, *EVENTS, *COMMANDS]
