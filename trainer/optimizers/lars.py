"""LARS: layers' rates by the ratio of norms."""

import optax

from trainer.layerwise import per_layer


def make(learning_rate, weight_decay, mask, *, momentum: float = 0.9,
         trust_coefficient: float = 0.001):
  """LARS (1708.03888) with the rate after the momentum, as PyTorch's SGD has it.

  Args:
    momentum: of the scaled gradients.
    trust_coefficient: factor on the ratio of norms.
  """
  return per_layer(optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), mask),
    optax.trace(momentum), optax.scale_by_learning_rate(learning_rate)))
