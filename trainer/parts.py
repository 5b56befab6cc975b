"""Parameters by their paths: parts of a tree, and the phases that train a part each."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax


def path_name(path) -> str:
  """("encoder", "blocks", "mlp") as "encoder/blocks/mlp"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                  for key in path)


class Whole(NamedTuple):
  """The phase that a method of one loss is."""

  part: str = ""
  times: int = 1


def part_of(params, pattern: str):
  """The parameters whose path matches, in a tree that has `optax.MaskedNode` for the others."""
  if not pattern:
    return params
  return jax.tree.map_with_path(
    lambda path, x: x if re.search(pattern, path_name(path)) else optax.MaskedNode(), params)


def with_part(params, part):
  """`params` with those of a part in the place of their own."""
  return jax.tree.map(lambda x, old: old if isinstance(x, optax.MaskedNode) else x, part, params,
                      is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def check_pattern(pattern: str, field: str):
  """Raises ValueError where this is no regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{field} = {pattern!r}: no regular expression: {error}") from error


def names(params) -> list[str]:
  """The paths of all parameters."""
  return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def listed(paths: list[str]) -> str:
  """The end of an error message: which parameters there are."""
  more = f" and {len(paths) - 12} more" if len(paths) > 12 else ""
  return f"they are {', '.join(paths[:12])}{more}"


def check_parts(phases: Mapping, params, is_frozen: Callable):
  """Raises ValueError unless every parameter is of one phase, or of none and frozen.

  `is_frozen` is of a path.
  """
  paths, trained_by = names(params), {}
  for name, phase in phases.items():
    said = f"phase {name!r} (part = {phase.part!r})"
    own = [path for path in paths if re.search(phase.part, path)]
    if not own:
      raise ValueError(f"phase {name!r}: part = {phase.part!r} matches no parameter; "
                       + listed(paths))
    for path in own:
      if path in trained_by:
        raise ValueError(f"{said} and {trained_by[path]} would both train {path}: a parameter is "
                         f"of one phase; {listed(own)}")
      trained_by[path] = said
  left = [path for path in paths if path not in trained_by and not is_frozen(path)]
  if left:
    raise ValueError(f"no phase trains {', '.join(left[:12])}, and it is not frozen; there are "
                     + ", ".join(dict.fromkeys(trained_by.values())))


def of_phases(phases: Mapping, build: Callable, check: Callable):
  """One transformation for all phases: each has a state of its own, and sees its part alone.

  `build` is (times a step) -> optax transformation. The state is {phase: state}, of a single phase
  its state; `update` is told by `phase` whose turn it is. `check` is called with all parameters.
  """
  for name, phase in phases.items():
    check_pattern(phase.part, f"phase {name!r}: part")
    if phase.times < 1:
      raise ValueError(f"phase {name!r}: times = {phase.times}: expected at least 1")
  txs = {name: optax.with_extra_args_support(build(phase.times)) for name, phase in phases.items()}
  only = next(iter(txs)) if len(txs) == 1 else None

  def init(params):
    check(params)
    states = {name: tx.init(part_of(params, phases[name].part)) for name, tx in txs.items()}
    return states if only is None else states[only]

  def update(grads, state, params=None, *, phase=only):
    if only is not None:
      return txs[only].update(grads, state, params)
    updates, own = txs[phase].update(grads, state[phase], params)
    return updates, {**state, phase: own}

  return optax.GradientTransformationExtraArgs(init, update)
