"""How fast parameters are trained, and by which of the optimizers."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import optax

from trainer import fields
from trainer.optimizers import OPTIMIZERS, OPTIONS
from trainer.parts import Whole, check_parts, check_pattern, of_phases, path_name


def decay_mask(pattern: str) -> Callable:
  """params -> bools: which of them weight decay acts on, those whose path matches.

  A layer's number that `per_layer` puts at the end of a path does not count.
  """
  return lambda params: jax.tree.map_with_path(
    lambda path, _: re.search(pattern, re.sub(r"/\d+$", "", path_name(path))) is not None, params)


class Rates(NamedTuple):
  """Called with a step it gives the learning rate."""

  main: Callable  # step -> rate, of what is in no group
  groups: Mapping[str, Callable]  # {group: step -> rate} of those that have one of their own

  def __call__(self, step):
    return self.main(step)


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
  rules, sections, makers = [], {}, {}
  if frozen or groups:
    from trainer import groups as parted
    rules, sections = parted.check_groups(frozen, groups or {})
  main = dict(schedule=schedule, name=name, lr=lr, base_lr=base_lr, weight_decay=weight_decay,
              decay=decay, **options)
  build_main, rate = settled("optimizer", batch_size, **main)
  for name, section in sections.items():
    if not section["frozen"]:
      makers[name] = settled(f"optimizer.groups.{name}", batch_size, **parted.inherited(
        main, section["own"], f"optimizer.groups.{name}", total_steps))

  def check(params):
    if rules:
      parted.check_rules(rules, params)
    if phases:
      check_parts(phases, params, lambda path: rules and parted.is_frozen(rules, path))

  def build(times):
    tx = build_main(times)
    if makers:
      tx = parted.by_label(rules, tx, {name: maker(times) for name, (maker, _) in makers.items()})
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
    if layer_decay != 1 or tuned_blocks is not None:
      from trainer.depth import scale_by_depth
      tx = optax.chain(tx, scale_by_depth(layer_decay, tuned_blocks))
    return parted.hold_frozen(rules, tx) if rules else tx

  return (of_phases(phases or {"": Whole()}, build, check),
          Rates(rate, {name: own for name, (_, own) in makers.items()
                       if {"lr", "base_lr", "schedule"} & sections[name]["own"].keys()}))


def stop_frozen(section: Mapping) -> Callable:
  """params -> params with no gradient where `config.optimizer`, the section, trains nothing."""
  stops = []
  if section.get("frozen") or section.get("groups"):
    from trainer import groups
    rules = groups.rules(section)
    stops.append(lambda params: groups.stop_frozen(rules, params))
  if section.get("tuned_blocks") is not None:
    from trainer import depth
    stops.append(lambda params: depth.stop_before(params, section["tuned_blocks"]))
  return lambda params: functools.reduce(lambda params, stop: stop(params), stops, params)
