"""Losses of texts, token by token: logits [b, l, v], ids [b, l] -> [b], or [b, l] of each token."""

import jax
import jax.numpy as jnp
import optax


def until_end(ids, eos_id: int):
  """True for a text's tokens up to its first `eos_id`, which counts; all where there is none."""
  ends = ids == eos_id
  return jnp.cumsum(ends, axis=1) - ends == 0                                # b l


def each_cross_entropy(logits, ids, smoothing: float = 0.0):
  """-sum_c q_c log softmax(z)_c of each token [b, l], in float32.

  q is 1 - s + s / v for the token that stands there, s / v for any other (1512.00567 sec. 7).
  """
  logits = logits.astype(jnp.float32)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)        # b l
  if smoothing:
    others = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
    each = (1 - smoothing) * each + smoothing * others
  return each


def cross_entropy(logits, ids, valid, smoothing: float = 0.0):
  """Mean of `each_cross_entropy` over the `valid` [b, l] tokens of a text."""
  each = each_cross_entropy(logits, ids, smoothing)
  return jnp.sum(each * valid, axis=1) / jnp.maximum(valid.sum(1), 1)
