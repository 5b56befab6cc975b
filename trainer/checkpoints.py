"""Checkpoints of a training state, and runs loaded back for evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from trainer import recipe
from trainer.state import TrainState

ITEMS = ("params", "opt", "extra", "ema")  # of a checkpoint; those without arrays are left out


def open_manager(workdir, *, every_steps: int | None = None, keep: int | None = 2,
                 keep_every_steps: int | None = None,
                 read_only: bool = False) -> ocp.CheckpointManager:
  """The checkpoints of a run directory, one folder a step.

  Args:
    every_steps: how often one is due (None: at the end only).
    keep: how many of the newest stay (None: all).
    keep_every_steps: checkpoints at multiples of this stay for ever.
  """
  def is_due(step, latest=None):
    return bool(every_steps) and step % every_steps == 0

  options = ocp.CheckpointManagerOptions(
    should_save_fn=None if read_only else is_due, max_to_keep=keep, keep_period=keep_every_steps,
    read_only=read_only, create=not read_only)
  return ocp.CheckpointManager(
    Path(workdir).absolute() / "checkpoints", options=options,
    item_handlers={name: ocp.StandardCheckpointHandler() for name in ITEMS})


def _items(state: TrainState) -> dict:
  return {name: tree for name, tree in state._asdict().items()
          if name in ITEMS and jax.tree.leaves(tree)}


def save(manager: ocp.CheckpointManager, state: TrainState, step: int):
  """Starts to write the state; returns when it is safe to go on training."""
  if step not in manager.all_steps():
    manager.save(step, force=True, args=ocp.args.Composite(
      **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}))


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
  """The state at a step, onto the shardings of `abstract`, whatever mesh wrote it."""
  items = manager.restore(step, args=ocp.args.Composite(
    **{name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}))
  step_array = jax.device_put(np.asarray(step, np.int32), abstract.step.sharding)
  return abstract._replace(step=step_array, **{name: items[name] for name in _items(abstract)})


class Run(NamedTuple):
  """A trained run, on one device."""

  config: ConfigDict
  method: Any
  params: Any  # the running average if the run keeps one
  extra: Any
  step: int
  predict: Callable  # (name, batch, rng=None) -> NumPy; batch["image"] as `preprocess` gives it
  preprocess: Callable  # uint8 images [b, h, w, c] -> float32, resized and normalised


def load_config(workdir) -> ConfigDict:
  """The config a run directory was made with. Raises FileNotFoundError if it holds no run."""
  path = Path(workdir) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
  return ConfigDict(json.loads(path.read_text()))


def load_run(workdir, step: int | None = None) -> Run:
  """Loads a run directory onto one device, whatever mesh wrote it.

  Args:
    workdir: made by train.py.
    step: which checkpoint; None = the newest.

  Raises:
    FileNotFoundError: no run, no checkpoint or not that step, with those there are.
  """
  config = load_config(workdir)
  method = recipe.make_method(config)
  augment = recipe.make_augment(config)
  with open_manager(workdir, keep=None, read_only=True) as manager:
    found = sorted(manager.all_steps())
    step = found[-1] if step is None and found else step
    if step not in found:
      raise FileNotFoundError(f"{workdir}/checkpoints has no step {step}; it has {found}")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    metadata = {name: tree for name, tree in manager.item_metadata(step).items()
                if name in ("params", "extra", "ema") and tree is not None}
    if "ema" in metadata:
      del metadata["params"]
    abstract = {name: jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
      for name, tree in metadata.items()}
    items = manager.restore(step, args=ocp.args.Composite(
      **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}))
  params = items["ema"] if "ema" in metadata else items["params"]
  extra = items["extra"] if "extra" in metadata else {}
  compiled = {name: jax.jit(function) for name, function in method.predict.items()}

  def predict(name, batch, rng=None):
    if name not in compiled:
      raise ValueError(f"no prediction {name!r}: {recipe.nearest(name, sorted(compiled))}")
    rng = jax.random.key(0) if rng is None else rng
    return jax.tree.map(np.asarray, compiled[name](
      params, extra, {key: jnp.asarray(x) for key, x in batch.items()}, rng))

  def preprocess(images):
    return np.asarray(augment.eval({"image": jnp.asarray(images)})["image"])

  return Run(config, method, params, extra, step, predict, preprocess)
