"""Losses of a class at each pixel."""

import optax


def cross_entropy(logits, mask):
  """logits [b, h, w, classes], mask int [b, h, w] -> [b], the mean over pixels."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, mask).mean((1, 2))
