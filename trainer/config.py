"""A config: loaded from `configs/NAME.py:VARIANT`, overridden by flags, compared."""

import ast
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs.base import own_data
from trainer import fields

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("steps", "epochs", "examples")
HELD_OUT = 0.1  # share of a folder with one split alone that a new run evaluates on
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
  if not path.is_file() and (ROOT / path).is_file():  # called from another folder
    path = ROOT / path
  if not path.is_file():
    found = sorted({str(path.parent / p.name) for folder in (path.parent, ROOT / path.parent)
                    for p in folder.glob("*.py")})
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
  source = _parse((overrides or {}).get("data.source", "none"))
  if source and scheme(source) != scheme(config.data.source):
    own_data(config)  # before the flags, which may say otherwise
    config.optional_evals = tuple(name for name in config.evals if not any(
      key.startswith(f"evals.{name}") for key in overrides))  # what a flag asks for is meant
  for key, text in (overrides or {}).items():
    override(config, key, text)
  if "data.batch_size" in (overrides or {}) and "batch_at_most" in config.data:
    del config.data.batch_at_most
  return config


def scheme(source: Any) -> str:
  """Of data.source: the name of the file in input_pipeline/sources that opens it."""
  from input_pipeline import sources  # here, as listing recipes needs no data
  return sources.parts(str(source))[0]


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


def read_json(path) -> dict:
  """What a file of a run directory says. Raises ValueError, with its name, where it is no JSON."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} can not be read: {error}. It is written once, at a run's start: put "
                     "a copy in its place, or take another --workdir") from error


def write(path: Path, text: str):
  """Writes a file aside and puts it in its place: a kill leaves the whole of it or none."""
  partial = path.with_suffix(".tmp")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def hold_out(config: ConfigDict, workdir) -> ConfigDict:
  """The config with the share of a folder of images that the run in `workdir` evaluates on.

  A run that is continued goes on with the share that it began with, or with none. A new one has
  HELD_OUT, of use where the folder has one split alone, unless its config says a share or splits.
  """
  data = config.data
  if ("held_out" in data or data.get("latents") or data.get("eval_split") is not None
      or "[" in str(data.get("train_split")) or scheme(data.get("source")) != "folder"):
    return config
  path, config = epath.Path(workdir) / "config.json", ConfigDict(config.to_dict())
  began = read_json(path)["data"] if path.exists() else {"held_out": HELD_OUT}
  config.data.held_out = began.get("held_out")
  return config


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
