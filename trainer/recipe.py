"""A config becomes functions: each section is the keyword arguments of exactly one of them.

Modules are found by name (`models/NAME.py`, `methods/NAME.py`, ...), arguments are checked before
anything runs, and errors speak in the config's words.
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.base import get_base
from input_pipeline import batches, geometry, order
from input_pipeline.records import ALWAYS, HINTS, image_features
from trainer import fields, networks, optimizer, schedule, sharding, store
from trainer.config import UNITS, in_steps, steps
from trainer.config import config_module as config_module
from trainer.config import differences as differences
from trainer.config import load_config as load_config
from trainer.config import override as override
from trainer.config import plain as plain
from trainer.networks import FROM_TEXT, make_model, split_name

log = logging.getLogger("vitrine")


def fill_from_data(config: ConfigDict, info, train_size: int, tokenizer=None) -> ConfigDict:
  """Writes into the config what it leaves to the data: steps, and the FROM_DATA of its model.

  A `none` of the command line is the choice "none" of a model that has one, not its default.
  """
  config = ConfigDict(config.to_dict())
  total = total_steps(config, train_size)
  for unit in UNITS:
    if f"total_{unit}" in config:
      del config[f"total_{unit}"]
  config.total_steps = total
  model = config.model
  for name, hint in (("image_size", int | tuple[int, int] | None), ("channels", int | None),
                     ("num_classes", int | None)):
    fields.check(fields.plain(model.get(name)), hint, f"config.model.{name}")
  module = fields.find_module("models", model.name, "config.model.name")
  accepted = fields.accepted(module.make)
  if info.image_shape is not None:
    fill_images(config, info.image_shape, accepted)
  for name, field in accepted.items():
    if "none" in fields.choices(field.hint) and name in model and model[name] is None:
      model[name] = "none"
  for name in inspect.signature(module.make).parameters if tokenizer else ():
    if name in FROM_TEXT:
      model[name] = getattr(tokenizer, name)
  model.num_classes = info.num_classes if model.get("num_classes") is None else model.num_classes
  if 0 < model.num_classes < info.num_classes:
    raise ValueError(f"config.model.num_classes = {model.num_classes}: the data has labels up to "
                     f"{info.num_classes - 1}")
  return config


def fill_images(config: ConfigDict, shape: tuple, accepted: Mapping):
  """Writes the images' size and channels into a config, whose model has `accepted` fields.

  Raises ValueError where it asks for a size and the images have several, or where their channels
  are not the config's.
  """
  (h, w, c), model = shape, config.model
  if config.augment.get("image_size") is None:
    if h is None and "image_size" not in accepted:
      return
    if h is None:
      raise ValueError("config.augment.image_size: the images differ in size, so say which to use")
    config.augment.image_size = (h, w)
  if not config.data.get("latents"):  # said of every run, as its default may change
    config.augment.eval_crop = config.augment.get("eval_crop") or 1.0
  size = model.get("image_size") or config.augment.image_size
  model.image_size = (size, size) if isinstance(size, int) else tuple(size)
  model.channels = model.get("channels") or c
  if model.channels != c:
    raise ValueError(f"config.model.channels = {model.channels}: the images have {c}")


def augmentation(config: ConfigDict, features: Mapping) -> tuple[Callable, dict]:
  """(the `make` of what the device does with batches of these features, its section's fields).

  Named by `augment.name`; else that of images or latents, where the batches have them.
  """
  section = config.augment.to_dict()
  default = "latents" if config.data.get("latents") else "images"
  if "name" not in section and "image" not in features:
    default, of_images = "plain", ("image_size", "eval_crop")  # what `fill_images` wrote
    section = {name: value for name, value in section.items() if name not in of_images}
  module = fields.find_module("input_pipeline.augment", section.pop("name", default),
                              "config.augment.name")
  return module.make, section


def make_augment(config: ConfigDict, features: Mapping | None = None):
  """What the device does with batches that have these features; None: with images."""
  features = image_features((None, None, None)) if features is None else features
  make, section = augmentation(config, features)
  return fields.call(make, section, "augment", latents=config.data.get("latents"),
                     batch_size=config.data.get("batch_size"), features=features)


def make_views(config: ConfigDict) -> tuple:
  """How the host cuts images: `geometry.View`s."""
  return geometry.views(config.augment.to_dict())


def make_method(config: ConfigDict):
  """The method, on its model, of a config that `fill_from_data` has completed."""
  model = make_model(config)
  name, section = split_name(config.method, "method")
  make = fields.find_module("methods", name, "config.method.name").make
  return fields.call(make, section, "method", model=model, total_steps=config.total_steps,
              batch_size=config.data.batch_size // config.accumulate)


def open_data(config: ConfigDict, data_dir: str | None):
  """The data, opened, with the cuts of config.augment: an `input_pipeline.batches.Reader`."""
  return fields.call(batches.open_data, config.data, "data",
                     data_dir=data_dir, seed=config.seed, views=make_views(config))


def make_data(config: ConfigDict, data_dir: str | None):
  """The input pipeline, with all that the data has."""
  return open_data(config, data_dir).carrying()


def carried(data, method, config: ConfigDict):
  """The data with what the method needs, and with labels and texts, which evaluations may ask for.

  Raises ValueError, with both lists, where the data lacks something.
  """
  features, source = data.info.features, config.data.source
  base = {name: name.removesuffix("_2") for name in method.needs}
  kept = [name for name, x in features.items()
          if name in base.values() or x.kind in ALWAYS or not method.needs]
  data = data.carrying(kept)
  views = ("", "_2") if config.augment.get("second_view") is not None else ("",)
  there = {name + view for name in data.spec for view in views} | {*data.spec}
  if missing := [name for name in method.needs if name not in there]:
    hints = [HINTS.get(features[name].kind, "") for name in missing if name in features] + [
      "; augment.second_view gives one" for name in missing if name != base[name] in features]
    raise ValueError(f"the method needs {' and '.join(method.needs)}; data.source = {source!r} has "
                     f"{' and '.join(sorted(features)) or 'nothing'}: no {' and no '.join(missing)}"
                     + "".join(hints[:1]))
  return data


def stand_in(config: ConfigDict):
  """What `make_data` gives, by its shapes alone: for planning and timing without the data set."""
  model, mean = config.model, config.augment.get("mean", 0.5)
  from input_pipeline.stand_in import stand_in
  return stand_in(
    config.data.source, config.data.batch_size, config.augment.get("image_size"),
    model.get("channels") or (len(mean) if isinstance(mean, (tuple, list)) else None),
    model.get("num_classes") or 0, views=len(make_views(config)),
    **{name: config.data[name] for name in ("latents", "tokenizer", "mask_token", *FROM_TEXT)
       if name in config.data})


def total_steps(config: ConfigDict, train_size: int) -> int:
  total = steps(config, "total", config.data.batch_size, train_size)
  if not total:
    raise ValueError("config: give total_steps, total_epochs or total_examples, at least one step")
  return total


def make_optimizer(config: ConfigDict, train_size: int, method=None):
  """(optax transformation, `optimizer.Rates`) of a config that `fill_from_data` has completed.

  Where a method is given each of its phases has an optimizer of its own.
  """
  batch_size, total = config.data.batch_size, config.total_steps
  durations = ("warmup", "cooldown", "hold", "delay")
  section = fields.plain(config.optimizer)
  groups = section.get("groups")
  for name, group in groups.items() if isinstance(groups, Mapping) else ():
    if isinstance(group, Mapping) and isinstance(group.get("schedule"), Mapping):
      try:
        group["schedule"] = in_steps(group["schedule"], durations, batch_size, train_size)
      except ValueError as error:
        raise ValueError(f"config.optimizer.groups.{name}.schedule: {error}") from error
  multiplier = fields.call(
    schedule.make, in_steps(config.schedule, durations, batch_size, train_size), "schedule",
    total_steps=total)
  return fields.call(optimizer.make, section, "optimizer", batch_size=batch_size,
              schedule=multiplier, total_steps=total, phases=method.turns if method else None)


def check_scalars(config: ConfigDict):
  """Raises ValueError where a field outside the sections is not what its default is."""
  for name, default in get_base().items():
    if not isinstance(default, ConfigDict) and name in config:
      fields.check(fields.plain(config[name]), type(default), f"config.{name}")
  for name in ("accumulate", "eval_batch_size"):
    if config[name] < 1:
      raise ValueError(f"config.{name} = {config[name]}: expected at least 1")


class Facts(NamedTuple):
  """What an evaluator's `check` is told of a run that is not started; names are as of a Context."""

  name: str  # what the config calls the evaluation
  predictions: frozenset[str]  # the names there are
  info: Any  # input_pipeline.records.Info
  train_split: str
  eval_split: str | None
  records: Callable  # (split, limit=None) -> what `collect` goes over; () where not in memory
  detokenize: Callable | None  # None where the data has no text


def facts_of(method, data, opened) -> Facts | None:
  """Facts of what is to be evaluated on `data`; None where it only stands in for a data set."""
  if data.eval is None:
    return None
  def records(split, limit=None):
    rows = getattr(opened, "splits", {}).get(split)
    if not isinstance(rows, list):
      return ()
    return rows if limit is None else [rows[i] for i in order.spread(len(rows), limit)]

  return Facts("", frozenset(method.predict), data.info, data.train_split, data.eval_split,
               records, data.tokenizer and data.tokenizer.decode)


def check_evals(evals: Mapping, facts: Facts | None = None, optional=()):
  """Raises ValueError where an evaluator does not exist, or does not take what is said of it.

  With facts each evaluator that has a `check(facts, **fields of its evaluate)` is asked as well.
  Those named in `optional` are taken from `evals` in the place of an error, which is told.
  """
  for name in [*evals]:
    try:
      _check_eval(name, {**evals[name]}, facts)
    except ValueError as error:
      if name not in optional:
        raise
      log.warning("own data: the evaluation %s is left out: %s", name, error)
      del evals[name]


def _check_eval(name: str, section: dict, facts: Facts | None):
  module = fields.find_module("evaluators", section.pop("name", name), f"config.evals.{name}")
  given = fields.arguments(module.evaluate, section, f"evals.{name}", context=None)
  if facts and hasattr(module, "check"):
    call = inspect.signature(module.evaluate).bind(**given)
    call.apply_defaults()
    del call.arguments["context"]
    module.check(facts._replace(name=name), **call.arguments)


class Recipe(NamedTuple):
  """Everything a run needs, made from its config and checked; nothing compiled yet."""

  config: ConfigDict  # completed with what the data says
  mesh: Any
  data: Any  # input_pipeline.batches.Data
  augment: Any  # input_pipeline.augment.Augment
  method: Any  # methods.method.Method
  tx: Any  # optax transformation; its update is told whose turn it is, phase=NAME
  rate: Callable  # step -> learning rate; rate.groups: {group: the same}
  total: int  # steps
  log_every: int  # steps
  eval_every: int  # steps; 0: at the end only
  checkpoint: Mapping  # arguments of `store.Checkpoints`, in steps


def build(config: ConfigDict, data_dir: str | None = None, *, data=None, devices=None) -> Recipe:
  """Makes a run's parts. Whatever is wrong in a config is a ValueError here, before compiling.

  `data` and `devices` stand in for the config's data set and the devices of this machine.
  """
  check_scalars(config)
  config = networks.fill(config)
  mesh = fields.call(sharding.make_mesh, config.mesh, "mesh", devices=devices)
  opened = data = open_data(config, data_dir) if data is None else data
  info, train_size = data.info, data.info.num_examples[data.train_split]
  if config.own_data:
    from trainer import own_data  # loaded where there is some
    config = own_data.settle(config, data)
  config = fill_from_data(config, info, train_size, data.tokenizer)
  batch_size = config.data.batch_size
  sharding.check_batch(batch_size, config.accumulate, mesh)
  method = make_method(config)
  data = carried(data, method, config)
  augment = make_augment(config, {name: info.features[name] for name in info.features
                                  if name in data.spec})
  if config.wandb and importlib.util.find_spec("wandb") is None:
    raise ValueError("config.wandb = True: Weights & Biases is not installed (pip install wandb)")
  if not 0 <= config.ema_decay < 1 or config.ema_gamma < 0:
    raise ValueError(f"config.ema_decay = {config.ema_decay}, config.ema_gamma = "
                     f"{config.ema_gamma}: expected a number in [0, 1), and one at least 0")
  if config.ema_decay and config.ema_gamma:
    raise ValueError("config.ema_decay and config.ema_gamma: give one of them")
  tx, rate = make_optimizer(config, train_size, method)
  for name, phase in method.phases.items():
    sharding.check_batch(batch_size, config.accumulate, mesh, times=(phase.times, name))
  check_evals(config.evals, facts_of(method, data, opened),
              config.optional_evals if config.own_data else ())
  checkpoint = in_steps(config.checkpoint, ("every", "keep_every"), batch_size, train_size)
  # Checked here, opened by the loop: a run directory is made only for a config that holds.
  fields.arguments(store.Checkpoints, checkpoint, "checkpoint", workdir="", metadata=None,
                   read_only=None)
  return Recipe(config, mesh, data, augment, method, tx, rate, config.total_steps,
                max(1, steps(config, "log_every", batch_size, train_size, 50)),
                steps(config, "eval_every", batch_size, train_size, 0),
                checkpoint)
