"""What a run directory keeps: checkpoints, asynchronous, atomic and checked; and the config."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from configs.base import get_base
from input_pipeline.records import Feature
from trainer import sharding
from trainer.config import read_json, scheme
from trainer.logging import read_metrics
from trainer.state import TrainState

# Of a checkpoint; those without arrays are left out.
ITEMS = ("params", "opt", "extra", "ema", "ema_statistics")
DATA = "data.json"  # in the run directory: the features and class names of its data
TOKENIZER = "tokenizer.json"  # in the run directory, of runs on text
log = logging.getLogger("vitrine")


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none could be read."""


def _items(state: TrainState) -> dict:
  return {name: tree for name, tree in state._asdict().items()
          if name in ITEMS and jax.tree.leaves(tree)}


def digest(tree, is_busy: bool = False) -> int:
  """One 32-bit word: the wrapped sum of all bits, however the arrays are split over devices.

  A flipped bit in a stored array is read back without a complaint; this shows it. The device is not
  asked where it `is_busy`, nor where its memory is the host's.
  """
  on_host = all(not isinstance(x, jax.Array) or x.is_fully_addressable and
                next(iter(x.devices())).platform == "cpu" for x in jax.tree.leaves(tree))
  return int((_digest_on_host if on_host or is_busy else _digest_on_device)(tree))


@jax.jit
def _digest_on_device(tree) -> jax.Array:
  def words(x):
    if x.dtype == jnp.bool_ or x.dtype.itemsize not in (1, 2, 4):
      return x.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)

  leaves = [jnp.sum(words(x), dtype=jnp.uint32) * np.uint32(2 * i + 1)
            for i, x in enumerate(jax.tree.leaves(tree))]
  return functools.reduce(jnp.add, leaves, jnp.uint32(0))


def _digest_on_host(tree) -> int:
  total = 0
  for i, x in enumerate(jax.tree.leaves(tree)):
    x = np.asarray(jax.device_get(x))
    plain = x.dtype == bool or x.dtype.itemsize not in (1, 2, 4)
    words = x.astype(np.uint32) if plain else x.view(f"u{x.dtype.itemsize}")
    total += int(np.sum(words, dtype=np.uint32)) * (2 * i + 1)
  return total % 2**32


@functools.cache
def code_version() -> str:
  """A hash of this project's sources: the same on every process that runs the same code."""
  root = Path(__file__).resolve().parent.parent
  content = hashlib.sha256()
  for path in sorted(root.glob("*/*.py")):
    if path.parent.name not in ("tests", "benchmarks"):
      content.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
  return content.hexdigest()[:12]


def newest(workdir) -> int | None:
  """The step of the newest checkpoint that was written to the end, damaged or not; None: none."""
  return max((int(path.name) for path in epath.Path(workdir).glob("checkpoints/*")
              if path.name.isdigit()), default=None)


def exist(workdir) -> bool:
  """Whether a run directory has a checkpoint that was written to the end."""
  return newest(workdir) is not None


def first_line(error: Exception) -> str:
  """An error in few words: what storage says of a disk is long, and says this at its end."""
  said = str(error) or type(error).__name__
  of_disk = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
  line = said.splitlines()[0].partition(". See full TensorStore details")[0]
  return next((words for words in of_disk if words in said), line)


class _Preserve:
  """Which checkpoints stay: the newest, those at certain steps, the best by a logged metric."""

  def __init__(self, workdir, keep, keep_every_steps, best, best_mode):
    self.workdir, self.keep, self.every = workdir, keep, keep_every_steps
    self.best, self.sign = best, 1 if best_mode == "max" else -1

  def should_preserve(self, checkpoints, *, context):
    steps = [checkpoint.step for checkpoint in checkpoints]
    newest = steps if self.keep is None else steps[-self.keep:]
    scored = [(self.sign * row[self.best], row["step"]) for row in read_metrics(self.workdir)
              if self.best in row and row["step"] in steps]
    best = max(scored)[1] if scored else None
    return [step in newest or step == best or bool(self.every) and step % self.every == 0
            for step in steps]


class Checkpoints:
  """The checkpoints of one run directory, a folder a step; the arguments are `config.checkpoint`.

  Args:
    workdir: the run directory; for checkpoints alone anything that `etils.epath` opens will do.
    every_steps, every_minutes: how often one is due, either or both (None: at the end only).
    keep: how many of the newest stay, at least 1 (None: all).
    keep_every_steps: checkpoints at multiples of this stay for ever.
    best: a metric of metrics.jsonl, such as "eval/knn/top1"; the best checkpoint by it stays.
    best_mode: "max" or "min".
    on_error: "raise" ends the run where one cannot be written, "warn" goes on to the next.
    metadata: plain facts to store with each.
    read_only: nothing is written, damaged checkpoints are left where they are.
  """

  def __init__(self, workdir, *, every_steps: int | None = None,
               every_minutes: float | None = None, keep: int | None = 2,
               keep_every_steps: int | None = None, best: str = "",
               best_mode: Literal["max", "min"] = "max",
               on_error: Literal["raise", "warn"] = "raise", metadata: Mapping | None = None,
               read_only: bool = False):
    if keep is not None and keep < 1:
      raise ValueError(f"config.checkpoint.keep = {keep}: at least 1, or none to keep all")
    self.directory = epath.Path(workdir).absolute() / "checkpoints"
    self.every_steps, self.every_minutes = every_steps, every_minutes
    self.on_error, self.metadata, self.read_only = on_error, dict(metadata or {}), read_only
    self.saved_at, self.damaged = time.monotonic(), set()
    self.pending = None  # the step whose writing was started and not yet seen to end
    # Copies of an array on several hosts share its writing; on one host that has only a cost, of a
    # program for every shape and device.
    ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(
      use_replica_parallel=jax.process_count() > 1), override=True)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    options = ocp.CheckpointManagerOptions(
      create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only,
      preservation_policy=None if read_only else _Preserve(
        workdir, keep, keep_every_steps, best, best_mode))
    self.manager = ocp.CheckpointManager(
      self.directory, options=options,
      item_handlers={**handlers, "metadata": ocp.JsonCheckpointHandler()})

  def steps(self) -> list[int]:
    """Those that were written to the end, and not found damaged."""
    return sorted(set(self.manager.all_steps()) - self.damaged)

  def due(self, step: int) -> bool:
    """Whether to save after this step; processes agree."""
    by_step = bool(self.every_steps) and step % self.every_steps == 0
    if not self.every_minutes:
      return by_step
    return by_step or sharding.agreed(
      time.monotonic() - self.saved_at >= 60 * self.every_minutes)

  def save(self, state: TrainState, step: int, is_busy: bool = False):
    """Starts to write the state; returns when it is safe to go on training.

    `is_busy`: the device still computes what nobody waits for any more, and is not asked.
    """
    self.finish()
    if step in self.steps():
      return
    self.saved_at = time.monotonic()
    facts = {**self.metadata, "step": step, "digests": {
      name: digest(tree, is_busy) for name, tree in _items(state).items()}}
    with self._reporting(step):
      # A folder that cannot be written to fails here: in the manager its threads would hang.
      probe = self.directory / f".probe_{jax.process_index()}"
      probe.write_bytes(b"")
      probe.unlink()
      if step in self.manager.all_steps():
        self.manager.delete(step)  # a damaged one: this is written over it
        self.damaged.discard(step)
      self.manager.save(step, force=True, args=ocp.args.Composite(
        metadata=ocp.args.JsonSave(facts),
        **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}))
      self.pending = step

  def finish(self):
    """Waits until what was started is written."""
    if self.pending is not None:
      step, self.pending = self.pending, None
      with self._reporting(step):
        self.manager.wait_until_finished()

  @contextlib.contextmanager
  def _reporting(self, step: int):
    """Turns any failure to write into this project's words, and clears what is half written."""
    try:
      yield
    except Exception as error:
      for rest in self.directory.glob(f"{step}.*tmp*"):
        shutil.rmtree(rest, ignore_errors=True)
      message = (f"checkpoint of step {step} could not be written to {self.directory}: "
                 f"{first_line(error)}. Earlier ones are whole: {self.steps()}")
      if self.on_error == "raise":
        raise CheckpointError(message) from error
      log.warning("%s. Training goes on to the next one.", message)

  def read(self, step: int, abstract: Mapping) -> tuple[dict, dict]:
    """(items, metadata) of a step onto the shardings of `abstract`. Raises CheckpointError."""
    try:
      items = self.manager.restore(step, args=ocp.args.Composite(
        metadata=ocp.args.JsonRestore(),
        **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}))
      facts = items["metadata"]
      wrong = [name for name in abstract
               if facts["digests"][name] != digest(items[name])]
    except Exception as error:  # whatever the storage makes of a file that is not whole
      raise CheckpointError(f"{self.directory / str(step)} is damaged: "
                            f"{first_line(error)[:200]}") from error
    if wrong:
      raise CheckpointError(f"{self.directory / str(step)} is damaged: the numbers of "
                            f"{', '.join(wrong)} are not those that were saved")
    return items, facts

  def newest(self, read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """(step, read(step)) of the newest that is whole, or None if there never was one.

    Raises CheckpointError where there are checkpoints and all are damaged.
    """
    for step in reversed(self.steps()):
      try:
        return step, read(step)
      except CheckpointError as error:
        self.damaged.add(step)
        log.warning("%s; the one before is used", error)
    if self.damaged:
      raise CheckpointError(f"no checkpoint in {self.directory} is whole; steps "
                            f"{sorted(self.damaged)} are damaged. Nothing was started: remove the "
                            "run directory to train anew")
    return None

  def restore(self, abstract: TrainState,
              absent: Mapping[str, Callable] | None = None) -> tuple[TrainState, dict] | None:
    """(state, metadata) of the newest whole checkpoint, onto any mesh; None if there is none.

    `absent` says what items are that a checkpoint of older code has not: {name: (items) -> tree}.
    """
    def read(step):
      there = {name: tree for name, tree in _items(abstract).items()
               if name not in (absent or {}) or (self.directory / str(step) / name).exists()}
      return self.read(step, there)

    found = self.newest(read)
    if found is None:
      return None
    step, (items, facts) = found
    items |= {name: jax.tree.map(jnp.copy, absent[name](items))
              for name in _items(abstract) if name not in items}
    array = jax.make_array_from_callback((), abstract.step.sharding,
                                         lambda _: np.asarray(step, np.int32))
    return abstract._replace(step=array, **{name: items[name] for name in _items(abstract)}), facts

  def close(self):
    """Waits for what is being written. Raises CheckpointError where that fails."""
    step = self.pending
    try:
      self.finish()
    finally:
      with self._reporting(step) if step is not None else contextlib.suppress(OSError):
        self.manager.close()


def data_facts(info) -> str:
  """What `load_facts` and `load_fingerprint` read, of a `records.Info`."""
  return json.dumps({"features": info.features, "class_names": info.class_names,
                     "fingerprint": info.fingerprint}, indent=2)


def _data_said(workdir) -> dict:
  """What a run directory says of its data; {} where older code kept nothing."""
  path = epath.Path(workdir) / DATA
  return read_json(path) if path.exists() else {}


def load_fingerprint(workdir) -> str | None:
  """That of the data a run directory was made with; None where older code kept none."""
  return _data_said(workdir).get("fingerprint")


def load_facts(workdir) -> tuple[dict, tuple[str, ...]]:
  """(features, class names) of a run's data; empty where older code kept none."""
  said = _data_said(workdir)
  features = {name: Feature(tuple(shape), *rest)
              for name, (shape, *rest) in said.get("features", {}).items()}
  return features, tuple(said.get("class_names", ()))


def load_config(workdir) -> ConfigDict:
  """The config a run directory was made with; fields that are newer than it have their defaults.

  Raises FileNotFoundError if it holds no run.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
  defaults = get_base().to_dict()
  config = {**defaults, **read_json(path)}
  if config["augment"].get("crop_area") and "eval_crop" not in config["augment"]:
    config["augment"]["eval_crop"] = 0.875  # what went with random crops, before it was a field
  if scheme(config["data"].get("source")) == "lines":  # texts had a black pixel once
    for section, name in ("augment", "image_size"), ("augment", "eval_crop"), (
        "model", "image_size"), ("model", "channels"):
      config[section].pop(name, None)
  return ConfigDict(config)
