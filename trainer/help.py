"""What --help says of a recipe: every field of every section, from what the section configures."""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from input_pipeline import batches
from trainer import fields, groups, networks, optimizer, recipe, schedule, sharding, store

WIDTH = 100
# What the run says of itself, or the data of a model: not asked of a section.
PROVIDED = ("model.image_size", "model.channels", "model.dtype", "method.model",
            "method.batch_size", "method.total_steps", "data.data_dir", "data.seed", "data.views",
            "augment.batch_size", "augment.latents", "augment.features", "optimizer.schedule",
            "optimizer.batch_size", "optimizer.phases", "optimizer.total_steps",
            "schedule.total_steps", "mesh.devices", "checkpoint.workdir", "checkpoint.metadata",
            "checkpoint.read_only", "context")


def help_of(config_name: str) -> str:
  """The recipe, its variants, and each field with default, type or choices and one line of help.

  Raises ValueError as `recipe.load_config`.
  """
  config = recipe.load_config(config_name)
  path = config_name.partition(":")[0]
  module = recipe.config_module(config_name)
  parts = [f"{path}\n\n{module.__doc__.strip()}",
           "variants: " + ", ".join(f":{name}" if name else "(none)" for name in module.VARIANTS)]
  from configs import base
  comments = _comments(inspect.getsource(base), r"(\w+)=")
  top = [_line(f"--config.{name}", type(value).__name__, value, comments.get(name, ""))
         for name, value in config.items()
         if not hasattr(value, "items") and name != "config_name"]
  parts.append("\n".join(["of the run", *top]))
  for label, function, section in _sections(config):
    parts.append("\n".join(_section(label, function, section)))
  return "\n\n".join(parts)


def print_config(built: recipe.Recipe, workdir):
  """The completed config as JSON, then what would run. Nothing is compiled or written."""
  from trainer import loop
  print(json.dumps(recipe.plain(built.config), indent=2))
  state, _ = loop.abstract_state(built)
  facts = loop.describe(built, state, 0, workdir)
  if store.exist(workdir):
    facts["run directory"] += " (holds a run, which would be continued)"
  for name, text in facts.items():
    print(f"{name:>13}  {text}")
  print("  evaluations  " + (", ".join(built.config.evals) or "none")
        + (f", every {built.eval_every:,} steps" if built.eval_every else ", at the end"))


def _sections(config):
  """(label, what takes the section, the recipe's own values)."""
  def found(folder, section):
    return fields.find_module(folder, config[section].name, f"config.{section}.name").make
  if config.init or "name" not in config.model:
    yield "init", networks.Init, config.init
  if "name" in config.model:
    yield "model", found("models", "model"), config.model
  yield "method", found("methods", "method"), config.method
  yield "data", batches.open_data, config.data
  yield "augment", recipe.augmentation(config, {"image": None})[0], config.augment
  yield "optimizer", optimizer.make, config.optimizer
  for name, section in (config.optimizer.get("groups") or {"NAME": {}}).items():
    yield f"optimizer.groups.{name}", groups.group, section
  yield "schedule", schedule.make, config.schedule
  yield "mesh", sharding.make_mesh, config.mesh
  yield "checkpoint", store.Checkpoints, config.checkpoint
  for name, section in config.evals.items():
    module = fields.find_module("evaluators", section.get("name", name), f"config.evals.{name}")
    yield f"evals.{name}", module.evaluate, section


def _section(label: str, function: Callable, section: Mapping) -> list[str]:
  file = Path(inspect.getsourcefile(function))
  lines = [f"{label}: {file.parent.name}/{file.name}"]
  known: dict[Callable, dict[str, str]] = {}
  for name, field in fields.accepted(function).items():
    of_others = name in networks.FROM_DATA and field.owner is not function  # of no effect here
    if name in PROVIDED or f"{label}.{name}" in PROVIDED or of_others:
      continue
    if field.owner not in known:
      known[field.owner] = help_lines(field.owner)
    lines.append(_line(f"--config.{label}.{name}", kind_of(field.hint), section.get(
      name, field.default), known[field.owner].get(field.own_name, ""), field.default))
  return lines


def kind_of(hint) -> str:
  """What a value may be: the names, or the types."""
  names = [str(name) or '""' for name in fields.choices(hint)]
  rest = [option for option in fields.options(hint) if not fields.choices(option)]
  return " | ".join([*names, *map(fields.name_of, rest)])


def _line(flag: str, kind: str, value, text: str, default=inspect.Parameter.empty) -> str:
  """One field: flag, its value here, what it may be, and what it is, folded to WIDTH."""
  none = inspect.Parameter.empty
  shown = "" if value is none else f" = {fields.plain(value)!r}"
  if default is not none and fields.plain(value) != default:
    shown += f" (default {default!r})"
  return textwrap.fill(f"  {flag}{shown}  [{kind}]  {text}", WIDTH, subsequent_indent="      ",
                       break_long_words=False, break_on_hyphens=False)


def help_lines(owner: Callable) -> dict[str, str]:
  """{field: what it is}, of a class by the comments beside its fields, else by its "Args:"."""
  found = {}
  ours = {path.name for path in Path(__file__).parents[1].iterdir() if path.is_dir()}
  for cls in reversed(getattr(owner, "__mro__", ())):
    if cls.__module__.partition(".")[0] in ours:
      found |= _comments(inspect.getsource(cls), r"(\w+): ")
  return found | _arguments(inspect.getdoc(owner) or "")


def _comments(source: str, name: str) -> dict[str, str]:
  """{name: the comment on its line and on the lines of nothing else that follow}."""
  found, last = {}, None
  for line in source.splitlines():
    start = re.match(rf"\s+{name}", line)
    code, mark, comment = line.partition("  # ")
    if start and code.strip():
      last = start[1]
      found[last] = comment.strip()
    elif last and found[last] and re.match(r"\s+#\s", line):
      found[last] += " " + line.strip().removeprefix("#").strip()
    else:
      last = None
  return {name: text for name, text in found.items() if text}


def _arguments(doc: str) -> dict[str, str]:
  """{name: its text} of a docstring's "Args:"."""
  block = re.search(r"^Args:\n((?:[ ]{2,}.*\n?|\n)*)", doc, re.M)
  found, names = {}, []
  for line in block[1].splitlines() if block else ():
    entry = re.match(r"  \*{0,2}(\w+(?:, \w+)*): (.*)", line)
    if entry:
      names = entry[1].split(", ")
      found |= dict.fromkeys(names, entry[2])
    else:
      found |= {name: f"{found[name]} {line.strip()}" for name in names}
  return found
