"""Optimizers: optax's, put together as the field's recipes ask."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np
import optax
from optax import contrib

# What stands before the first block: embeddings, tokens, positions.
BEFORE_BLOCKS = (r"(^|/)(embed|embed_norm|convolutions|position|segment|cls|cls_position|registers"
                 r"|input_norm)(/|$)")


def path_name(path) -> str:
  """("encoder", "blocks", "mlp") as "encoder/blocks/mlp"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                  for key in path)


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
    tree = jax.tree.map_with_path(
      lambda path, _: "frozen" if re.search(pattern, path_name(path)) else "trained", params)
    if set(jax.tree.leaves(tree)) != {"frozen", "trained"}:
      paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
      raise ValueError(f"optimizer.frozen = {pattern!r}: must match some parameters and not all; "
                       f"they are {', '.join(paths)}")
    return tree

  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Shows `tx` each layer of a stacked parameter as one of its own.

  For optimizers whose update depends on a whole tensor's norm or shape.
  """
  def split(tree):
    def leaf(path, x):
      return [x[i] for i in range(x.shape[0])] if "blocks" in path_name(path).split("/") else x
    return jax.tree.map_with_path(leaf, tree)

  def join(tree):
    return jax.tree.map(lambda x: jax.numpy.stack(x) if isinstance(x, list) else x, tree,
                        is_leaf=lambda x: isinstance(x, list))

  def update(updates, state, params=None):
    updates, state = tx.update(split(updates), state, split(params))
    return join(updates), state

  return optax.GradientTransformation(lambda params: tx.init(split(params)), update)


def _lars(learning_rate, weight_decay, mask, *, momentum: float = 0.9,
          trust_coefficient: float = 0.001):
  """LARS (1708.03888) with the rate after the momentum, as PyTorch's SGD has it.

  Args:
    momentum: of the scaled gradients.
    trust_coefficient: factor on the ratio of norms.
  """
  return optax.chain(optax.add_decayed_weights(weight_decay, mask),
                     optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient),
                                  mask),
                     optax.trace(momentum), optax.scale_by_learning_rate(learning_rate))


def _sgd(learning_rate, weight_decay, mask, *, momentum: float = 0.9, nesterov: bool = False):
  """Stochastic gradient descent.

  Args:
    momentum: of the gradients.
    nesterov: whether it looks ahead.
  """
  return optax.chain(optax.add_decayed_weights(weight_decay, mask),
                     optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov))


def _muon(learning_rate, weight_decay, mask, *, beta: float = 0.95, ns_steps: int = 5,
          consistent_rms: float | None = 0.2, b1: float = 0.9, b2: float = 0.95):
  """Muon on the matrices of the blocks (query, key and value apart), AdamW on all else.

  Args:
    beta: momentum.
    ns_steps: Newton-Schulz iterations.
    consistent_rms: 0.2 gives updates AdamW's scale, so that one rate serves both (2502.16982).
    b1, b2: AdamW's.
  """
  axes = {"qkv_kernel": contrib.MuonDimensionNumbers(1, (3, 4)),             # layer d 3 k h
          "out/kernel": contrib.MuonDimensionNumbers((1, 2), 3),             # layer k h d
          "up/kernel": contrib.MuonDimensionNumbers(1, 2),                   # layer d hidden
          "down/kernel": contrib.MuonDimensionNumbers(1, 2)}

  def matrix_axes(path, _):
    name = path_name(path)
    return next((spec for end, spec in axes.items()
                 if "blocks" in name.split("/") and name.endswith(end)), None)

  def labels(params):
    return jax.tree.map_with_path(
      lambda *leaf: "adamw" if matrix_axes(*leaf) is None else "muon", params)

  return optax.partition({
    "muon": contrib.muon(
      learning_rate, beta=beta, ns_steps=ns_steps, weight_decay=weight_decay,
      consistent_rms=consistent_rms,
      muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(matrix_axes, params)),
    "adamw": _adamw(learning_rate, weight_decay, mask, b1=b1, b2=b2)}, labels)


def _scale_by_raw_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """m / (sqrt(v) + eps) of moments that are not debiased (1810.04805's code)."""
  def init(params):
    return optax.ScaleByAdamState(jax.numpy.zeros((), jax.numpy.int32),
                                  optax.tree.zeros_like(params), optax.tree.zeros_like(params))

  def update(updates, state, params=None):
    m = optax.tree.update_moment(updates, state.mu, b1, 1)
    v = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    return (jax.tree.map(lambda m, v: m / (jax.numpy.sqrt(v) + eps), m, v),
            optax.ScaleByAdamState(state.count + 1, m, v))

  return optax.GradientTransformation(init, update)


def _adamw(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.999,
           eps: float = 1e-8, debias: bool = True):
  """AdamW (1711.05101).

  Args:
    b1, b2: decay of the first and the second moment.
    eps: added to the root of the second.
    debias: whether both are divided by what their start at 0 costs; 1810.04805's code does not.
  """
  if debias:
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
  return optax.chain(_scale_by_raw_adam(b1, b2, eps),
                     optax.add_decayed_weights(weight_decay, mask),
                     optax.scale_by_learning_rate(learning_rate))


def _lamb(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-6, always_adapt: bool = False):
  """LAMB (1904.00962 algorithm 2) as Apex's FusedLAMB and timm have it.

  The trust ratio is of the tensors that decay: without it a bias, a norm or layer scale moves as
  under Adam, where with it one that starts near zero could grow by a factor of 1 + rate a step
  only.

  Args:
    b1, b2: decay of the first and the second moment.
    eps: added to the root of the second.
    always_adapt: gives the ratio to all.
  """
  adapted = (lambda params: jax.tree.map(lambda _: True, params)) if always_adapt else (
    mask if weight_decay else (lambda params: jax.tree.map(lambda _: False, params)))
  return optax.chain(optax.scale_by_adam(b1, b2, eps),
                     optax.add_decayed_weights(weight_decay, mask),
                     optax.masked(optax.scale_by_trust_ratio(), adapted),
                     optax.scale_by_learning_rate(learning_rate))


def _lion(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.99):
  """Lion (2302.06675).

  Args:
    b1: share of the moment in the update.
    b2: decay of the moment.
  """
  return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)


def _adafactor(learning_rate, weight_decay, mask, *, decay_rate: float = 0.8,
               momentum: float = 0.9, clipping_threshold: float | None = None,
               beta2_cap: float = 0.999, min_dim_size_to_factor: int = 32):
  """Adafactor as 2106.04560 sec. 3.4 and its authors' code have it.

  No scale by the parameter's own and no clipping of the update; a first moment, not debiased.

  Args:
    decay_rate: the second moment's beta2 at step t is 1 - t^-decay_rate.
    momentum: of the first moment; 0 = none.
    clipping_threshold: root mean square that an update is clipped to; None = not clipped.
    beta2_cap: beta2 is this at most.
    min_dim_size_to_factor: the second moment is factored where two sides are at least this.
  """
  return optax.chain(
    optax.scale_by_factored_rms(
      min_dim_size_to_factor=min_dim_size_to_factor, decay_rate=decay_rate,
      decay_rate_fn=lambda step, rate: jax.numpy.minimum(
        beta2_cap, 1 - (step + 1).astype(jax.numpy.float32) ** -rate)),
    optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity(),
    optax.ema(momentum, debias=False) if momentum else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate))


# name -> ((learning_rate, weight_decay, mask, **options) -> optax transformation, per layer?)
OPTIMIZERS: Mapping[str, tuple[Callable, bool]] = {
  "adamw": (_adamw, False), "sgd": (_sgd, False), "lars": (_lars, True), "lamb": (_lamb, True),
  "adafactor": (_adafactor, True), "lion": (_lion, False), "muon": (_muon, False)}


def make(*, schedule: Callable, batch_size: int, name: Literal[*OPTIMIZERS] = "adamw",
         lr: float | None = None, base_lr: float | None = None, weight_decay: float = 0.0,
         decay: str = r"kernel$", frozen: str | None = None, tuned_blocks: int | None = None,
         layer_decay: float = 1.0, clip_norm: float | None = None,
         **options: tuple(function for function, _ in OPTIMIZERS.values())):
  """Returns (optax transformation, step -> learning rate).

  Args:
    schedule: step -> multiplier of the peak rate.
    batch_size: examples a step.
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
  build, layerwise = OPTIMIZERS[name]
  unknown = set(options) - set(inspect.signature(build).parameters)
  if unknown:
    allowed = list(inspect.signature(build).parameters)[3:]
    raise ValueError(f"optimizer.{min(unknown)}: {name} takes {', '.join(allowed)}; "
                     f"--config.optimizer.{min(unknown)}=none leaves it out")
  peak = lr if lr is not None else base_lr * batch_size / 256

  def rate(step):
    return peak * schedule(step)

  tx = build(rate, weight_decay, decay_mask(decay), **options)
  tx = per_layer(tx) if layerwise else tx
  if not 0 < layer_decay <= 1 or (tuned_blocks or 0) < 0:
    raise ValueError(f"optimizer.layer_decay = {layer_decay}: expected a number in (0, 1]; "
                     f"optimizer.tuned_blocks = {tuned_blocks}: at least 0")
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
  if layer_decay != 1 or tuned_blocks is not None:
    tx = optax.chain(tx, scale_by_depth(layer_decay, tuned_blocks))
  return (leave_frozen(frozen, tx) if frozen else tx), rate
