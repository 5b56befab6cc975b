"""The fields of a config's section: the keyword arguments of the one function that it configures.

Names, types, defaults and choices are read from the function's signature. What its ** stands for is
said by the annotation of it: a class whose fields, or a function whose keywords, are meant; a tuple
of those; {prefix: class} where the fields' names begin with something; `Modules`, of which the
section names one.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict

from input_pipeline.records import nearest as nearest

PLAIN = (bool, int, float, str, tuple, dict)
OF_FLAX = ("parent", "name", "dtype")  # fields of every module; dtype is the run's


def find_module(folder: str, name: str, field: str):
  """The module FOLDER/NAME.py. Raises ValueError with the nearest name."""
  if importlib.util.find_spec(f"{folder}.{name}") is None or not str(name).isidentifier():
    root = Path(importlib.import_module(folder).__path__[0])
    raise ValueError(f"{field} = {name!r}: no {folder}/{name}.py; "
                     + nearest(name, sorted(path.stem for path in root.glob("*.py"))))
  return importlib.import_module(f"{folder}.{name}")


# --- What a function takes ------------------------------------------------------------------------

class Modules(typing.NamedTuple):
  """Keywords of `make` in FOLDER/NAME.py, where the field `name` says which of `names`."""

  folder: str
  names: tuple[str, ...]

  def makes(self, named) -> tuple[Callable, ...]:
    """Of the one that is named; of all where that is none of them."""
    return tuple(find_module(self.folder, name, "name").make
                 for name in ((named,) if named in self.names else self.names))


class Field(typing.NamedTuple):
  """One field of a section."""

  hint: Any  # its annotation
  default: Any  # Parameter.empty: there is none, or it is another field's to say
  owner: Callable  # the function or class that documents it
  own_name: str  # what it is called there


def accepted(function: Callable, named=None) -> dict[str, Field]:
  """{name: Field} of all that a function takes, that of its ** too; its own go before those.

  Of `Modules` the one that is `named` is loaded and asked; without a name all of them.
  """
  parameters = inspect.signature(function).parameters.values()
  own = {p.name: Field(p.annotation, p.default, function, p.name) for p in parameters
         if p.kind is not p.VAR_KEYWORD}
  rest = {}
  for p in parameters:
    if p.kind is p.VAR_KEYWORD and p.annotation is not p.empty:
      target = p.annotation.makes(named) if isinstance(p.annotation, Modules) else p.annotation
      for name, field in _passed_on(target, ""):
        if not {name, field.own_name} & own.keys():
          rest.setdefault(name, field)
  return own | rest


def _passed_on(target, prefix: str) -> Iterator[tuple[str, Field]]:
  if isinstance(target, tuple):
    for one in target:
      yield from _passed_on(one, prefix)
  elif isinstance(target, Mapping):
    for begin, one in target.items():
      yield from _passed_on(one, prefix + begin)
  elif dataclasses.is_dataclass(target):
    for field in dataclasses.fields(target):
      is_part = isinstance(field.type, type) and field.type not in PLAIN
      if field.name not in OF_FLAX and not is_part:
        missing = field.default is dataclasses.MISSING
        yield prefix + field.name, Field(field.type, Parameter.empty if missing else field.default,
                                         target, field.name)
  else:
    for p in inspect.signature(target).parameters.values():
      if p.kind is p.KEYWORD_ONLY or isinstance(target, type):
        yield prefix + p.name, Field(p.annotation, p.default, target, p.name)


# --- What a value may be --------------------------------------------------------------------------

def options(hint) -> tuple:
  """(int, None) of `int | None`."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def choices(hint) -> tuple:
  """The names that a field may have, of its Literal; () where it is none."""
  return tuple(name for option in options(hint) if typing.get_origin(option) is Literal
               for name in typing.get_args(option))


def takes_none(hint) -> bool:
  return hint in (Parameter.empty, Any, object) or types.NoneType in options(hint)


def _fits(value, hint) -> bool:
  """Whether a value is of an annotated type. int counts as float; what is no plain type fits."""
  for option in options(hint):
    origin, inside = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
      fits = value in inside and type(value) is not bool or any(value is x for x in inside)
    elif origin is tuple:
      every = inside[:1] * len(value) if inside[1:] == (...,) and isinstance(
        value, tuple) else inside
      fits = isinstance(value, tuple) and len(value) == len(every) and all(map(_fits, value, every))
    elif option is tuple:
      fits = isinstance(value, tuple)
    elif (origin or option) in (Mapping, dict):
      fits = isinstance(value, Mapping)
    elif option in (bool, int, str, types.NoneType):
      fits = type(value) is option
    elif option is float:
      fits = type(value) in (int, float)
    else:
      fits = True
    if fits:
      return True
  return False


def name_of(hint) -> str:
  """A hint as a reader knows it: "int or None", "tuple of float"."""
  def one(option):
    origin, inside = typing.get_origin(option), typing.get_args(option)
    if option is types.NoneType:
      return "None"
    if origin is Literal:
      return " or ".join(map(repr, inside))
    if origin is tuple and inside[1:] == (...,):
      return {int: "whole numbers", float: "numbers", str: "names"}.get(
        inside[0], "values") + ", in brackets"
    if origin is tuple:
      return f"({', '.join(map(name_of, inside))})"
    return "dict" if (origin or option) in (Mapping, dict) else getattr(option, "__name__", "value")
  return " or ".join(map(one, options(hint)))


def check(value, hint, field: str):
  """Raises ValueError with the field's name unless its value is what the annotation says."""
  if not _fits(value, hint):
    if names := choices(hint):
      raise ValueError(f"{field} = {value!r}: {nearest(value, names)}")
    raise ValueError(f"{field} = {value!r}: expected {name_of(hint)}")


# --- Calls ----------------------------------------------------------------------------------------

def plain(value):
  """A config's value with dicts for its sections, tuples for lists and Python's numbers."""
  if isinstance(value, ConfigDict | dict):
    return {name: plain(x) for name, x in value.items()}
  if isinstance(value, np.generic):
    return value.item()
  return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def arguments(function: Callable, section: Mapping, field: str, **provided) -> dict:
  """The keyword arguments of a call, after checking the section's names, types and choices.

  What is provided and not asked for is left out, and is not the section's to say; None stands for
  the default where the function does not take None. Raises ValueError in the config's words.
  """
  section, own = plain(section), inspect.signature(function).parameters
  allowed = accepted(function, section.get("name") or getattr(own.get("name"), "default", None))
  if not section.keys() <= allowed.keys():
    allowed = accepted(function)  # to say what was meant, or whose it is
  result = {name: value for name, value in provided.items() if name in own}
  free = sorted(set(allowed) - set(provided))
  for name, value in section.items():
    if name in provided:
      raise ValueError(f"config.{field}.{name}: what the run says itself is no field of a section")
    if name not in allowed:
      raise ValueError(f"config.{field}.{name}: unknown field; " + nearest(name, free))
    hint = allowed[name].hint
    if value is None and not takes_none(hint):
      continue
    check(value, hint, f"config.{field}.{name}")
    result[name] = value
  try:
    inspect.signature(function).bind(**result)
  except TypeError as error:  # an argument that has no default and that nobody gave
    raise ValueError(f"config.{field}: {error}") from error
  return result


def call(function: Callable, section: Mapping, field: str, **provided) -> Any:
  """function(**provided, **section), checked as `arguments` says."""
  return function(**arguments(function, section, field, **provided))
