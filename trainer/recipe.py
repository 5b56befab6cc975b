"""A config becomes functions: each section is the keyword arguments of exactly one of them.

Modules are found by name (`models/NAME.py`, `methods/NAME.py`, ...), arguments are checked before
anything runs, and errors speak in the config's words.
"""

import ast
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.base import get_base
from input_pipeline import batches, geometry
from trainer import fields, networks, optimizer, schedule, sharding, store
from trainer.networks import FROM_TEXT, make_model, split_name

UNITS = ("steps", "epochs", "examples")
SHORT = {"init": "init.run"}  # what --config.NAME=VALUE of a whole section means



def steps(section: Mapping, name: str, batch_size: int, train_size: int,
          default: int | None = None) -> int | None:
  """A duration in steps, from the one of NAME_steps, NAME_epochs, NAME_examples that is given."""
  given = {unit: section.get(f"{name}_{unit}") for unit in UNITS}
  given = {unit: value for unit, value in given.items() if value is not None}
  if len(given) > 1:
    raise ValueError(f"give one of {', '.join(f'{name}_{unit}' for unit in given)}, not several")
  if not given:
    return default
  (unit, value), = given.items()
  if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
    raise ValueError(f"{name}_{unit} = {value!r}: expected a number of {unit}, at least 0")
  examples = {"steps": batch_size, "epochs": train_size, "examples": 1}[unit]
  return round(value * examples / batch_size)


def in_steps(section: Mapping, names: tuple[str, ...], batch_size: int, train_size: int) -> dict:
  """A section with each duration of `names` converted to NAME_steps."""
  duration = {f"{name}_{unit}" for name in names for unit in UNITS}
  rest = {key: value for key, value in section.items() if key not in duration}
  converted = {f"{name}_steps": steps(section, name, batch_size, train_size) for name in names}
  return {**rest, **{key: value for key, value in converted.items() if value is not None}}


# --- Config files and overrides -------------------------------------------------------------------

def config_module(name: str):
  """The module `configs/NAME.py` of `configs/NAME.py:VARIANT`. Raises ValueError."""
  path, _, variant = name.partition(":")
  path = Path(path if path.endswith(".py") else f"{path}.py")
  if not path.is_file():
    found = sorted(map(str, path.parent.glob("*.py")))
    raise ValueError(f"--config={name}: no file {path}; " + fields.nearest(path, found))
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if variant not in module.VARIANTS:
    raise ValueError(f"--config={name}: {path} has no variant {variant!r}; "
                     + fields.nearest(variant, [v for v in module.VARIANTS if v]))
  return module


def load_config(name: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """`configs/NAME.py:VARIANT` -> its ConfigDict, with overrides such as "optimizer.lr": "1e-3"."""
  module, (path, _, variant) = config_module(name), name.partition(":")
  config = module.get_config(variant)
  config.config_name = Path(path).stem + (f":{variant}" if variant else "")
  for key, text in (overrides or {}).items():
    override(config, key, text)
  return config


def _parse(text: str) -> Any:
  """A Python literal, or the text itself: `3`, `1e-3`, `(1, 2)`, `true`, `none`, `B/16`."""
  word = {"true": True, "false": False, "none": None, "null": None}
  if text.lower() in word:
    return word[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def override(config: ConfigDict, key: str, text: str):
  """Sets config.KEY. A duration replaces the same duration in another unit.

  New names are allowed inside sections, whose functions check them; top-level names must exist.
  """
  *sections, leaf = SHORT.get(key, key).split(".")
  value, node = _parse(text), config
  for i, section in enumerate(sections):
    if section not in node:
      if i == 0:
        raise ValueError(f"config.{key}: unknown section; " + fields.nearest(section, sorted(node)))
      node[section] = ConfigDict()
    node = node[section]
    if not isinstance(node, ConfigDict):
      raise ValueError(f"config.{key}: {section} is a value, not a section")
  stem, _, unit = leaf.rpartition("_")
  if unit in UNITS and stem:
    for other in UNITS:
      if f"{stem}_{other}" in node and other != unit:
        del node[f"{stem}_{other}"]
  elif not sections and leaf not in node:
    raise ValueError(f"config.{key}: unknown field; " + fields.nearest(leaf, sorted(node)))
  old = node.get(leaf)
  if value is None and (isinstance(old, ConfigDict) and sections or sections == ["evals"]):
    if leaf in node:  # an evaluator that is not wanted
      del node[leaf]
    return
  if isinstance(old, ConfigDict) and not isinstance(value, dict):
    raise ValueError(f"config.{key} = {text}: it is a section; set config.{key}.FIELD")
  if isinstance(old, str) and not isinstance(value, str | tuple) and value is not None:
    value = text  # a number may be a name; what is in brackets is meant as it stands
  if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if old is not None and value is not None and not sections and type(old) is not type(value):
    raise ValueError(f"config.{key} = {text!r}: expected {type(old).__name__}")
  with node.unlocked(), node.ignore_type():
    node[leaf] = ConfigDict(value) if isinstance(value, dict) else value


def plain(config) -> dict:
  """A ConfigDict as JSON-ready plain values."""
  return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
  """Lines `field: old -> new` where two plain configs differ."""
  lines = []
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f"{prefix}{key}.")
    elif a != b:
      lines.append(f"config.{prefix}{key}: {a!r} -> {b!r}")
  return lines


# --- From sections to functions -------------------------------------------------------------------

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
  h, w, c = info.image_shape
  if config.augment.get("image_size") is None:
    if h is None:
      raise ValueError("config.augment.image_size: the images differ in size, so say which to use")
    config.augment.image_size = (h, w)
  if not config.data.get("latents"):  # said of every run, as its default may change
    config.augment.eval_crop = config.augment.get("eval_crop") or 1.0
  model = config.model
  for name, hint in (("image_size", int | tuple[int, int] | None), ("channels", int | None),
                     ("num_classes", int | None)):
    fields.check(fields.plain(model.get(name)), hint, f"config.model.{name}")
  size = model.get("image_size") or config.augment.image_size
  model.image_size = (size, size) if isinstance(size, int) else tuple(size)
  model.channels = model.get("channels") or c
  if model.channels != c:
    raise ValueError(f"config.model.channels = {model.channels}: the images have {c}")
  module = fields.find_module("models", model.name, "config.model.name")
  for name, field in fields.accepted(module.make).items():
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


def make_augment(config: ConfigDict):
  """What the device does with images that the views cut."""
  latents = config.data.get("latents")
  module = fields.find_module("input_pipeline", "latents" if latents else "augment", "")
  return fields.call(module.make, config.augment, "augment", latents=latents,
              batch_size=config.data.get("batch_size"))


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


def make_data(config: ConfigDict, data_dir: str | None):
  """The input pipeline, with the cuts of config.augment."""
  return fields.call(batches.make, config.data, "data",
              data_dir=data_dir, seed=config.seed, views=make_views(config))


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


def check_evals(evals: Mapping):
  """Raises ValueError where an evaluator does not exist, or does not take what is said of it."""
  for label, section in evals.items():
    section = {**section}
    module = fields.find_module("evaluators", section.pop("name", label), f"config.evals.{label}")
    fields.arguments(module.evaluate, section, f"evals.{label}", context=None)


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
  data = make_data(config, data_dir) if data is None else data
  train_size = data.info.num_examples[data.train_split]
  config = fill_from_data(config, data.info, train_size, data.tokenizer)
  batch_size = config.data.batch_size
  sharding.check_batch(batch_size, config.accumulate, mesh)
  augment = make_augment(config)
  method = make_method(config)
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
  check_evals(config.evals)
  checkpoint = in_steps(config.checkpoint, ("every", "keep_every"), batch_size, train_size)
  # Checked here, opened by the loop: a run directory is made only for a config that holds.
  fields.arguments(store.Checkpoints, checkpoint, "checkpoint", workdir="", metadata=None,
                   read_only=None)
  return Recipe(config, mesh, data, augment, method, tx, rate, config.total_steps,
                max(1, steps(config, "log_every", batch_size, train_size, 50)),
                steps(config, "eval_every", batch_size, train_size, 0),
                checkpoint)
