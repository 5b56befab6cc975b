"""The table of optimizers: optax's, put together as the field's recipes ask."""

from collections.abc import Callable, Mapping

import jax
import optax
from optax import contrib

from trainer.parts import path_name


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
