"""Stochastic gradient descent with momentum."""

import optax


def make(learning_rate, weight_decay, mask, *, momentum: float = 0.9, nesterov: bool = False):
  """Stochastic gradient descent.

  Args:
    momentum: of the gradients.
    nesterov: whether it looks ahead.
  """
  return optax.chain(optax.add_decayed_weights(weight_decay, mask),
                     optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov))
