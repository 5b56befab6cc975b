"""Who attends to whom: masks broadcastable to [b, k, q, n], True = attend.

Those by place take `delta` int [b or 1, q, n, axes]: a query's place less a key's, on each axis of
a text (1) or a grid (2). Masks are joined by `flax.linen.combine_masks`.
"""

import jax.numpy as jnp


def causal(delta):
  """No query sees what comes after it (1706.03762 sec. 3.2.3): [b, 1, q, n]."""
  return (delta[..., 0] >= 0)[:, None]


def window(delta, size: int):
  """Sliding window (2004.05150 sec. 3.1): keys fewer than `size` places away, on every axis."""
  return (abs(delta).max(-1) < size)[:, None]


def padding(valid):
  """Keys [b, n] that are no padding: [b, 1, 1, n]."""
  return valid[:, None, None]


def prefix(lengths, length: int):
  """The first `lengths` [b] tokens see each other, later ones all before them: [b, 1, l, l].

  UniLM's sequence-to-sequence mask (1905.03197 sec. 2.3) and the prefix language model's.
  """
  place = jnp.arange(length)
  seen = (place[None] < lengths[:, None])[:, None]                           # b 1 l
  return (seen | (place[:, None] >= place[None])[None])[:, None]
