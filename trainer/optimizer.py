"""Which parameters are trained, how fast and by which of the optimizers."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

from trainer.optimizers import OPTIMIZERS, path_name, per_layer

# What stands before the first block: embeddings, tokens, positions.
BEFORE_BLOCKS = (r"(^|/)(embed|embed_norm|convolutions|position|segment|cls|cls_position|registers"
                 r"|input_norm)(/|$)")


def decay_mask(pattern: str) -> Callable:
  """params -> bools: which of them weight decay acts on, those whose path matches.

  A layer's number that `per_layer` puts at the end of a path does not count.
  """
  return lambda params: jax.tree.map_with_path(
    lambda path, _: re.search(pattern, re.sub(r"/\d+$", "", path_name(path))) is not None, params)


def stop_frozen(section: Mapping) -> Callable:
  """params -> params with no gradient where `config.optimizer`, the section, trains nothing."""
  pattern, tuned = section.get("frozen"), section.get("tuned_blocks")

  def stop(params):
    scales = by_depth(params, 1.0, tuned)

    def leaf(path, x, scale):
      if pattern and re.search(pattern, path_name(path)):
        return jax.lax.stop_gradient(x)
      fixed = int((np.asarray(scale) == 0).sum())                            # of stacked blocks
      return x if not fixed else jax.lax.stop_gradient(x) if np.ndim(scale) == 0 else (
        jax.numpy.concatenate([jax.lax.stop_gradient(x[:fixed]), x[fixed:]]))
    return jax.tree.map_with_path(leaf, params, scales)
  return (lambda params: params) if pattern is None and tuned is None else stop


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


def leave_frozen(pattern: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` on all parameters but those whose path matches: they stay, and have no optimizer state."""
  def labels(params):
    return jax.tree.map_with_path(
      lambda path, _: "frozen" if re.search(pattern, path_name(path)) else "trained", params)

  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


# --- Phases ---------------------------------------------------------------------------------------

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


def _paths(params) -> list[str]:
  return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def _first(paths: list[str]) -> str:
  """The end of an error message: which parameters there are."""
  more = f" and {len(paths) - 12} more" if len(paths) > 12 else ""
  return f"they are {', '.join(paths[:12])}{more}"


def check_frozen(pattern: str, params):
  """Raises ValueError unless it matches some of the parameters, and not all."""
  paths = _paths(params)
  if len({re.search(pattern, path) is None for path in paths}) != 2:
    raise ValueError(f"optimizer.frozen = {pattern!r}: must match some parameters and not all; "
                     + _first(paths))


def check_parts(phases: Mapping, params, frozen: str | None):
  """Raises ValueError unless every parameter is of one phase, or of none and frozen."""
  paths, trained_by = _paths(params), {}
  for name, phase in phases.items():
    said = f"phase {name!r} (part = {phase.part!r})"
    own = [path for path in paths if re.search(phase.part, path)]
    if not own:
      raise ValueError(f"phase {name!r}: part = {phase.part!r} matches no parameter; "
                       + _first(paths))
    for path in own:
      if path in trained_by:
        raise ValueError(f"{said} and {trained_by[path]} would both train {path}: a parameter is "
                         f"of one phase; {_first(own)}")
      trained_by[path] = said
  left = [path for path in paths
          if path not in trained_by and not (frozen and re.search(frozen, path))]
  if left:
    raise ValueError(f"no phase trains {', '.join(left[:12])}, and optimizer.frozen = {frozen!r} "
                     f"does not match it; the phases are {', '.join(trained_by.values())}")


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


class Whole(NamedTuple):
  """The phase that a method of one loss is."""

  part: str = ""
  times: int = 1


def make(*, schedule: Callable, batch_size: int, phases: Mapping | None = None,
         name: Literal[*OPTIMIZERS] = "adamw", lr: float | None = None,
         base_lr: float | None = None, weight_decay: float = 0.0, decay: str = r"kernel$",
         frozen: str | None = None, tuned_blocks: int | None = None, layer_decay: float = 1.0,
         clip_norm: float | None = None,
         **options: tuple(function for function, _ in OPTIMIZERS.values())):
  """Returns (optax transformation, step -> learning rate).

  Args:
    schedule: step -> multiplier of the peak rate.
    batch_size: examples a step.
    phases: of the method, {name: `part`, `times`}; None = it has one loss.
    name: a key of OPTIMIZERS.
    lr, base_lr: the peak rate, or the peak rate for 256 examples (1706.02677): give one.
    weight_decay: decoupled and times the rate (in the gradient for sgd and lars).
    decay: regular expression; parameters whose path matches decay. The default leaves out biases,
      norms, positions and tokens.
    frozen: regular expression; parameters whose path matches are not trained.
    tuned_blocks: how many of the last blocks are trained, with what follows them; None = all.
    layer_decay: factor in (0, 1] on the rate for each layer further from the output.
    clip_norm: global norm that gradients are clipped to; None = not clipped.
    **options: keywords of the optimizer's row above (b1, b2, eps, momentum, ...).
  """
  if (lr is None) == (base_lr is None):
    raise ValueError(f"optimizer: give lr or base_lr, not both (lr = {lr}, base_lr = {base_lr})")
  row, layerwise = OPTIMIZERS[name]
  unknown = set(options) - set(inspect.signature(row).parameters)
  if unknown:
    allowed = list(inspect.signature(row).parameters)[3:]
    raise ValueError(f"optimizer.{min(unknown)}: {name} takes {', '.join(allowed)}; "
                     f"--config.optimizer.{min(unknown)}=none leaves it out")
  if not 0 < layer_decay <= 1 or (tuned_blocks or 0) < 0:
    raise ValueError(f"optimizer.layer_decay = {layer_decay}: expected a number in (0, 1]; "
                     f"optimizer.tuned_blocks = {tuned_blocks}: at least 0")
  peak = lr if lr is not None else base_lr * batch_size / 256

  def rate(step):
    return peak * schedule(step)

  def build(times):
    tx = row(lambda count: rate(count if times == 1 else count // times), weight_decay,
             decay_mask(decay), **options)
    tx = per_layer(tx) if layerwise else tx
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
    if layer_decay != 1 or tuned_blocks is not None:
      tx = optax.chain(tx, scale_by_depth(layer_decay, tuned_blocks))
    return leave_frozen(frozen, tx) if frozen else tx

  def check(params):
    if frozen:
      check_frozen(frozen, params)
    if phases:
      check_parts(phases, params, frozen)

  return of_phases(phases or {"": Whole()}, build, check), rate
