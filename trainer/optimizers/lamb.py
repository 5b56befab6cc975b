"""LAMB: Adam with layers' rates by the ratio of norms."""

import jax
import optax

from trainer.layerwise import per_layer


def make(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.999,
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
  return per_layer(optax.chain(
    optax.scale_by_adam(b1, b2, eps),
    optax.add_decayed_weights(weight_decay, mask),
    optax.masked(optax.scale_by_trust_ratio(), adapted),
    optax.scale_by_learning_rate(learning_rate)))
