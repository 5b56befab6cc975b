"""Run directories into notebooks and evaluations: parameters, predictions, preprocessing."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from input_pipeline import batches, viewing
from input_pipeline.records import image_features
from trainer import recipe
from trainer.state import make_predict, with_statistics
from trainer.store import ITEMS, TOKENIZER, CheckpointError, Checkpoints
from trainer.stored import load_config, load_facts


class Run(NamedTuple):
  """A trained run, on one device."""

  config: ConfigDict
  method: Any
  params: Any  # the running average if the run keeps one
  extra: Any
  step: int
  predict: Callable  # (name, batch, rng=None) -> NumPy; batch["image"] as `preprocess` gives it
  preprocess: Callable  # uint8 images [b, h, w, c], or a list of sizes -> float32, cut as
  #                       evaluation cuts, and normalised; or what a source gives, a record, several
  #                       or a dict of columns -> the batch, a dict, that `predict` takes
  normalise: Callable  # uint8 images that are cut already, as of `data.eval` -> float32
  tokenize: Callable | None  # texts -> int32 [n, l]; None if the run has none
  detokenize: Callable | None  # int [l], one row -> its text
  class_names: tuple[str, ...] = ()  # of the data, in the order of its labels


def load_run(workdir, step: int | None = None) -> Run:
  """Loads a run directory onto one device, whatever mesh wrote it.

  Args:
    workdir: made by train.py.
    step: which checkpoint; None = the newest that is whole.

  Raises:
    FileNotFoundError: no run, no checkpoint or not that step, with those there are.
    CheckpointError: the checkpoint is damaged.
  """
  config = load_config(workdir)
  method, (features, class_names) = recipe.make_method(config), load_facts(workdir)
  features = features or _assumed(config, method)
  augment = recipe.make_augment(config, features)
  absl = logging.getLogger("absl")
  level = absl.level
  absl.setLevel(logging.ERROR)  # it warns that read-only means read-only
  checkpoints = Checkpoints(workdir, read_only=True)
  absl.setLevel(level)
  if not checkpoints.steps() or step not in (None, *checkpoints.steps()):
    raise FileNotFoundError(f"{checkpoints.directory} has no checkpoint"
                            f"{'' if step is None else f' of step {step}'}; it has "
                            f"{checkpoints.steps() or 'none'}")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def read(step):
    """Parameters alone, shaped as the checkpoint itself says: no optimizer is built."""
    shapes = {name: jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree)
      for name, tree in _shapes(checkpoints, step).items()}
    return checkpoints.read(step, shapes)[0]

  step, items = (step, read(step)) if step is not None else checkpoints.newest(read)
  checkpoints.close()
  params = items.get("ema") or items["params"]
  extra = with_statistics(method, items.get("extra") or {}, items.get("ema_statistics"))
  predict = make_predict(method, lambda: (params, extra))

  def normalise(images):
    return np.asarray(augment.eval({"image": jnp.asarray(images)})["image"])

  def preprocess(images):
    if isinstance(images, Mapping) or isinstance(images, list | tuple) and images and isinstance(
        images[0], Mapping):
      from input_pipeline import ready
      batch = ready.batch_of(images, features, recipe.make_views(config)[0], tokenizer,
                             config.data.get("latents"))
      return {name: np.asarray(x) for name, x in augment.eval(batch).items()}
    if config.data.get("latents"):
      return normalise(images)
    return normalise(viewing.evaluation_pixels(recipe.make_views(config)[0], images))

  tokenizer, path = None, epath.Path(workdir) / TOKENIZER
  if path.exists():
    tokenizer = batches.read_tokenizer(path.read_text(encoding="utf-8"))
    config.data.tokenizer = str(path)  # other captions would give another one
  return Run(config, method, params, extra, step, predict, preprocess, normalise,
             tokenizer and tokenizer.encode, tokenizer and tokenizer.decode, class_names)


def _assumed(config: ConfigDict, method) -> dict:
  """The features of a run's data, where older code did not write them down."""
  known = image_features((None, None, config.model.get("channels")),
                         config.model.get("num_classes") or 0,
                         "latent" if config.data.get("latents") else "image", text=True)
  return {name: feature for name, feature in known.items()
          if name != "image" or not method.needs or name in method.needs}


def _shapes(checkpoints: Checkpoints, step: int) -> dict:
  try:
    metadata = checkpoints.manager.item_metadata(step)
    trees = {name: metadata[name] for name in ITEMS if name != "opt"
             if metadata.get(name) is not None}
    sizes = [math.prod(m.shape) for m in jax.tree.leaves(trees)]
  except Exception as error:
    raise CheckpointError(f"{checkpoints.directory / str(step)} is damaged: {error}") from error
  if not sizes:
    raise CheckpointError(f"{checkpoints.directory / str(step)} is damaged: it lists no arrays")
  return {name: tree for name, tree in trees.items() if name != "params" or "ema" not in trees}
