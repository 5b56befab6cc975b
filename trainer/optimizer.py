"""Which parameters are trained, how fast and by which of the optimizers."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

from trainer import fields
from trainer import schedule as schedules
from trainer.optimizers import OPTIMIZERS, OPTIONS
from trainer.parts import (
  Whole,
  check_parts,
  check_pattern,
  listed,
  names,
  of_phases,
  path_name,
)

# What stands before the first block: embeddings, tokens, positions.
BEFORE_BLOCKS = (r"(^|/)(embed|embed_norm|convolutions|position|segment|cls|cls_position|registers"
                 r"|input_norm)(/|$)")


def decay_mask(pattern: str) -> Callable:
  """params -> bools: which of them weight decay acts on, those whose path matches.

  A layer's number that `per_layer` puts at the end of a path does not count.
  """
  return lambda params: jax.tree.map_with_path(
    lambda path, _: re.search(pattern, re.sub(r"/\d+$", "", path_name(path))) is not None, params)


# --- Whose a parameter is -------------------------------------------------------------------------

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


def stop_frozen(section: Mapping) -> Callable:
  """params -> params with no gradient where `config.optimizer`, the section, trains nothing."""
  found, tuned = rules(section), section.get("tuned_blocks")

  def stop(params):
    scales = by_depth(params, 1.0, tuned)

    def leaf(x, label, scale):
      if label == FROZEN:
        return jax.lax.stop_gradient(x)
      fixed = int((np.asarray(scale) == 0).sum())                            # of stacked blocks
      return x if not fixed else jax.lax.stop_gradient(x) if np.ndim(scale) == 0 else (
        jax.numpy.concatenate([jax.lax.stop_gradient(x[:fixed]), x[fixed:]]))
    return jax.tree.map(leaf, params, labels(found, params), scales)
  return stop if FROZEN in {rule.label for rule in found} or tuned is not None else (
    lambda params: params)


def by_depth(params, decay: float, tuned: int | None):
  """Multipliers of the rate, one a parameter; of stacked blocks an array [depth].

  `decay` to the power of how many layers are above, as BEiT has it (2106.08254 appendix;
  2111.06377 table 9): 0 for what follows the blocks, depth + 1 for what is before them. 0 for what
  is before the last `tuned` blocks (None: all are tuned), as in 2111.06377 figure 9.

  Raises ValueError where there are no stacked blocks, stacks of several depths, or fewer blocks.
  """
  def in_blocks(path):
    return "blocks" in path_name(path).split("/")

  if decay == 1 and tuned is None:
    return jax.tree.map(lambda _: 1.0, params)
  depths = {x.shape[0] for path, x in jax.tree.leaves_with_path(params) if in_blocks(path)}
  if len(depths) != 1 or not 0 <= (tuned or 0) <= max(depths):
    raise ValueError(f"optimizer.layer_decay = {decay} and optimizer.tuned_blocks = {tuned} need a "
                     f"model of one stack of blocks; depths here: {sorted(depths) or 'none'}")
  depth, = depths
  scales = decay ** np.arange(depth + 1, -1, -1.0)  # before the blocks, of each, after them
  scales[:0 if tuned is None else depth + 1 - tuned] = 0

  def leaf(path, _):
    if in_blocks(path):
      return scales[1:-1]
    return float(scales[0 if re.search(BEFORE_BLOCKS, path_name(path)) else -1])
  return jax.tree.map_with_path(leaf, params)


def scale_by_depth(decay: float, tuned: int | None) -> optax.GradientTransformation:
  """Multiplies updates as `by_depth` says: each part has a rate of its own."""
  def init(params):
    by_depth(params, decay, tuned)  # its errors, now
    return optax.EmptyState()

  def update(updates, state, params=None):
    return jax.tree.map(
      lambda u, scale: u * jax.numpy.reshape(jax.numpy.asarray(scale, u.dtype),
                                             (-1,) + (1,) * (u.ndim - 1) if np.ndim(scale) else ()),
      updates, by_depth(updates, decay, tuned)), state

  return optax.GradientTransformation(init, update)


# --- Groups ---------------------------------------------------------------------------------------

class Rates(NamedTuple):
  """Called with a step it gives the learning rate."""

  main: Callable  # step -> rate, of what is in no group
  groups: Mapping[str, Callable]  # {group: step -> rate} of those that have one of their own

  def __call__(self, step):
    return self.main(step)


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


def check_groups(groups: Mapping) -> dict:
  """{name: what `group` makes of its section}. Raises ValueError in the config's words."""
  for name, section in groups.items():
    if not name.isidentifier():
      raise ValueError(f"config.optimizer.groups.{name}: expected a name of letters, digits and _")
    fields.check(section, Mapping, f"config.optimizer.groups.{name}")
  return {name: fields.call(group, section, f"optimizer.groups.{name}")
          for name, section in sorted(groups.items())}


def inherited(main: Mapping, own: Mapping, field: str, total_steps: int | None) -> dict:
  """The settings of a group: its own, and what `main` has in the place of those not said."""
  rest = main | ({"lr": None, "base_lr": None} if {"lr", "base_lr"} & own.keys() else {})
  if own.get("name", main["name"]) != main["name"]:  # options are of the optimizer that is named
    rest = {name: x for name, x in rest.items() if name in inspect.signature(group).parameters}
  if "schedule" in own:
    own = own | {"schedule": fields.call(schedules.make, own["schedule"], f"{field}.schedule",
                                         total_steps=total_steps)}
  return {**rest, **own}


def settled(field: str, batch_size: int, *, schedule: Callable, name: str, lr: float | None,
            base_lr: float | None, weight_decay: float, decay: str, **options):
  """(times a step -> optax transformation, step -> rate) of one section, named by `field`."""
  if (lr is None) == (base_lr is None):
    raise ValueError(f"{field}: give lr or base_lr, not both (lr = {lr}, base_lr = {base_lr})")
  named = fields.find_module("trainer.optimizers", name, f"config.{field}.name").make
  unknown = set(options) - set(inspect.signature(named).parameters)
  if unknown:
    allowed = list(inspect.signature(named).parameters)[3:]
    raise ValueError(f"{field}.{min(unknown)}: {name} takes {', '.join(allowed)}; "
                     f"--config.{field}.{min(unknown)}=none leaves it out")
  check_pattern(decay, f"{field}.decay")
  peak = lr if lr is not None else base_lr * batch_size / 256

  def rate(step):
    return peak * schedule(step)

  def build(times):
    return named(lambda count: rate(count if times == 1 else count // times), weight_decay,
                 decay_mask(decay), **options)
  return build, rate


def joined(found: list[Rule], txs: Mapping, clip_norm: float | None, layer_decay: float,
           tuned_blocks: int | None) -> optax.GradientTransformation:
  """One transformation of those by label. What is frozen stays, and has no optimizer state."""
  tx = txs[TRAINED] if len(txs) == 1 else optax.partition(txs, lambda p: labels(found, p))
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
  if layer_decay != 1 or tuned_blocks is not None:
    tx = optax.chain(tx, scale_by_depth(layer_decay, tuned_blocks))
  if FROZEN not in {rule.label for rule in found}:
    return tx
  return optax.partition({TRAINED: tx, FROZEN: optax.set_to_zero()}, lambda params: jax.tree.map(
    lambda label: FROZEN if label == FROZEN else TRAINED, labels(found, params)))


def make(*, schedule: Callable, batch_size: int, total_steps: int | None = None,
         phases: Mapping | None = None, name: Literal[*OPTIMIZERS] = "adamw",
         lr: float | None = None, base_lr: float | None = None, weight_decay: float = 0.0,
         decay: str = r"kernel$", frozen: str | None = None,
         groups: Mapping[str, Mapping] | None = None, tuned_blocks: int | None = None,
         layer_decay: float = 1.0, clip_norm: float | None = None, **options: OPTIONS):
  """Returns (optax transformation, `Rates`).

  Args:
    schedule: step -> multiplier of the peak rate.
    batch_size: examples a step.
    total_steps: of the run, for the schedules of groups.
    phases: of the method, {name: `part`, `times`}; None = it has one loss.
    name: a key of OPTIMIZERS.
    lr, base_lr: the peak rate, or the peak rate for 256 examples (1706.02677): give one.
    weight_decay: decoupled and times the rate (in the gradient for sgd and lars).
    decay: regular expression; parameters whose path matches decay. The default leaves out biases,
      norms, positions and tokens.
    frozen: regular expression; parameters whose path matches are not trained.
    groups: {NAME: section}; paths with a rate, decay, schedule or optimizer of their own, or none.
    tuned_blocks: how many of the last blocks are trained, with what follows them; None = all.
    layer_decay: factor in (0, 1] on the rate for each layer further from the output.
    clip_norm: global norm that gradients are clipped to; None = not clipped.
    **options: keywords of the optimizer (b1, b2, eps, momentum, ...).
  """
  if not 0 < layer_decay <= 1 or (tuned_blocks or 0) < 0:
    raise ValueError(f"optimizer.layer_decay = {layer_decay}: expected a number in (0, 1]; "
                     f"optimizer.tuned_blocks = {tuned_blocks}: at least 0")
  groups = check_groups(groups or {})
  found = rules(dict(frozen=frozen, groups=groups))
  for rule in found:
    check_pattern(rule.pattern, rule.field)
  main = dict(schedule=schedule, name=name, lr=lr, base_lr=base_lr, weight_decay=weight_decay,
              decay=decay, **options)
  makers = {TRAINED: settled("optimizer", batch_size, **main)}
  for name, section in groups.items():
    field = f"optimizer.groups.{name}"
    if not section["frozen"]:
      makers[f"group_{name}"] = settled(field, batch_size, **inherited(
        main, section["own"], field, total_steps))

  def check(params):
    check_rules(found, params)
    if phases:
      check_parts(phases, params, lambda path: is_frozen(found, path))

  def build(times):
    return joined(found, {label: maker(times) for label, (maker, _) in makers.items()},
                  clip_norm, layer_decay, tuned_blocks)

  own_rates = {name: makers[f"group_{name}"][1] for name, section in groups.items()
               if not section["frozen"] and {"lr", "base_lr", "schedule"} & section["own"].keys()}
  return (of_phases(phases or {"": Whole()}, build, check),
          Rates(makers[TRAINED][1], own_rates))
