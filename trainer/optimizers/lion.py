"""Lion: the sign of a moment."""

import optax


def make(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.99):
  """Lion (2302.06675).

  Args:
    b1: share of the moment in the update.
    b2: decay of the moment.
  """
  return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)
