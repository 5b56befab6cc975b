"""Whose a parameter is: groups with settings of their own, and what is not trained."""

import inspect
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import optax

from trainer import fields
from trainer import schedule as schedules
from trainer.optimizers import OPTIMIZERS, OPTIONS
from trainer.parts import check_pattern, listed, names, path_name

TRAINED, FROZEN = "trained", "frozen"  # labels of what is in no group, and of what stays


class Rule(NamedTuple):
  """A pattern of the config: it has the parameters that match, but for those of a rule before."""

  field: str
  pattern: str
  label: str  # FROZEN, or group_NAME


def rules(section: Mapping) -> list[Rule]:
  """Those of `config.optimizer`: `frozen`, then the groups by name."""
  groups = section.get("groups") or {}
  found = [Rule("optimizer.frozen", section["frozen"], FROZEN)] if section.get("frozen") else []
  return found + [Rule(f"optimizer.groups.{name}.path", groups[name]["path"],
                       FROZEN if groups[name].get("frozen") else f"group_{name}")
                  for name in sorted(groups)]


def owner(found: list[Rule], path: str) -> Rule | None:
  return next((rule for rule in found if re.search(rule.pattern, path)), None)


def is_frozen(found: list[Rule], path: str) -> bool:
  rule = owner(found, path)
  return rule is not None and rule.label == FROZEN


def labels(found: list[Rule], params):
  """A tree like params of TRAINED, FROZEN and group_NAME."""
  def leaf(path, _):
    rule = owner(found, path_name(path))
    return rule.label if rule else TRAINED
  return jax.tree.map_with_path(leaf, params)


def check_rules(found: list[Rule], params):
  """Raises ValueError where a rule is left without parameters, or nothing is trained."""
  paths = names(params)
  owners = {path: owner(found, path) for path in paths}
  for rule in found:
    said, matched = f"{rule.field} = {rule.pattern!r}", [
      path for path in paths if re.search(rule.pattern, path)]
    if rule.label == FROZEN and len(matched) in (0, len(paths)):
      raise ValueError(f"{said}: must match some parameters and not all; {listed(paths)}")
    if not matched:
      raise ValueError(f"{said}: matches no parameter; {listed(paths)}")
    if rule not in owners.values():
      first = owners[matched[0]]
      raise ValueError(f"{said}: all that it matches is taken by {first.field} = "
                       f"{first.pattern!r}; {listed(matched)}")
  if found and all(is_frozen(found, path) for path in paths):
    raise ValueError(f"{' and '.join(rule.field for rule in found)} leave nothing to train")


def stop_frozen(found: list[Rule], params):
  """`params` with no gradient in those that are frozen."""
  return jax.tree.map(lambda x, label: jax.lax.stop_gradient(x) if label == FROZEN else x,
                      params, labels(found, params))


def by_label(found: list[Rule], main, own: Mapping) -> optax.GradientTransformation:
  """One transformation of several: {group: its own}, and `main` for what is in no group."""
  txs = {TRAINED: main, **{f"group_{name}": tx for name, tx in own.items()}}
  return optax.partition(txs, lambda params: labels(found, params))


def hold_frozen(found: list[Rule], tx) -> optax.GradientTransformation:
  """`tx` on what is trained. What is frozen stays, and has no optimizer state."""
  if FROZEN not in {rule.label for rule in found}:
    return tx
  return optax.partition({TRAINED: tx, FROZEN: optax.set_to_zero()}, lambda params: jax.tree.map(
    lambda label: FROZEN if label == FROZEN else TRAINED, labels(found, params)))


# --- What a group's section says ------------------------------------------------------------------

def group(*, path: str, lr: float | None = None, base_lr: float | None = None,
          weight_decay: float | None = None, decay: str | None = None,
          schedule: Mapping | None = None, frozen: bool = False,
          name: Literal[*OPTIMIZERS] | None = None, **options: OPTIONS) -> dict:
  """What a section of `optimizer.groups` says of the parameters whose path matches.

  Args:
    path: regular expression; of several groups that match the first by name has a parameter.
    lr, base_lr: the peak rate, or that for 256 examples; None = the optimizer section's.
    weight_decay: as the optimizer section's; None = what that one is.
    decay: regular expression on the paths that decay; None = the optimizer section's.
    schedule: a section as config.schedule is, in the place of all of it; None = config.schedule.
    frozen: whether the parameters are not trained; all else is of no effect then.
    name: a key of OPTIMIZERS; None = the optimizer section's, with its options.
    **options: keywords of the optimizer (b1, b2, eps, momentum, ...).
  """
  said = dict(lr=lr, base_lr=base_lr, weight_decay=weight_decay, decay=decay, schedule=schedule,
              name=name)
  return {"path": path, "frozen": frozen, "own": options | {
    field: value for field, value in said.items() if value is not None}}


def check_groups(frozen: str | None, groups: Mapping) -> tuple[list[Rule], dict]:
  """(the rules, {name: what `group` makes of its section}). Raises ValueError in config's words."""
  for name, section in groups.items():
    if not name.isidentifier():
      raise ValueError(f"config.optimizer.groups.{name}: expected a name of letters, digits and _")
    fields.check(section, Mapping, f"config.optimizer.groups.{name}")
  sections = {name: fields.call(group, section, f"optimizer.groups.{name}")
              for name, section in sorted(groups.items())}
  found = rules(dict(frozen=frozen, groups=sections))
  for rule in found:
    check_pattern(rule.pattern, rule.field)
  return found, sections


def inherited(main: Mapping, own: Mapping, field: str, total_steps: int | None) -> dict:
  """The settings of a group: its own, and what `main` has in the place of those not said."""
  rest = main | ({"lr": None, "base_lr": None} if {"lr", "base_lr"} & own.keys() else {})
  if own.get("name", main["name"]) != main["name"]:  # options are of the optimizer that is named
    rest = {name: x for name, x in rest.items() if name in inspect.signature(group).parameters}
  if "schedule" in own:
    own = own | {"schedule": fields.call(schedules.make, own["schedule"], f"{field}.schedule",
                                         total_steps=total_steps)}
  return {**rest, **own}
