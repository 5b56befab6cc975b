"""Contrastive losses on unit-norm embeddings [b, d]: per example, in float32, of the global batch.

Under jit a sharded batch is one array, so other devices' examples are negatives without a gather.
"""

import jax
import jax.numpy as jnp
import optax


def normalize(x, epsilon: float = 1e-12):
  """x / |x| over the last axis in float32, for |x| at least epsilon."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def queue_logits(query, key, queue, temperature: float):
  """MoCo's logits (1911.05722 eq. 1): [b, 1 + K], the first column is the positive pair.

  query, key [b, d] and queue [K, d], unit norm; only the query carries a gradient.
  """
  key, queue = jax.lax.stop_gradient((key, queue))
  positive = jnp.einsum("bd,bd->b", query, key)
  negative = jnp.einsum("bd,Kd->bK", query, queue)
  return jnp.concatenate([positive[:, None], negative], axis=1) / temperature


def batch_logits(query, key, temperature: float):
  """MoCo v3's logits (2104.02057 alg. 1): [b, b], the positive pairs on the diagonal."""
  return jnp.einsum("bd,nd->bn", query, jax.lax.stop_gradient(key)) / temperature


def info_nce(logits, label):
  """-log softmax(logits)[label] (1807.03748 eq. 4), per example: [b, n], int [b] -> [b]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _similarity(image, text):
  return jnp.einsum("bd,nd->bn", image, text, precision="highest")


def _over_texts(step, start, text, chunk: int):
  """step(carry, (texts [n, d], their places [n])) -> (carry, [n] or None), over all texts.

  Without a `chunk` in one go. With one, over n = chunk of the b texts at a time, whose similarities
  exist at that time only, in the backward pass too. Chunk j is the texts j, j + b / chunk, ...: so
  on a mesh every device holds its part of each. Raises ValueError if `chunk` does not divide b.
  """
  parts = text, jnp.arange(text.shape[0])
  if not chunk:
    return step(start, parts)
  if text.shape[0] % chunk:
    raise ValueError(f"chunk = {chunk} does not divide the {text.shape[0]} texts of a batch")
  parts = jax.tree.map(lambda x: x.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1), parts)
  carry, out = jax.lax.scan(jax.checkpoint(step), start, parts)              # out: b/chunk chunk
  return carry, None if out is None else out.T.ravel()


def clip_loss(image, text, logit_scale, chunk: int = 0):
  """Symmetric cross-entropy (2103.00020 fig. 3) of pairs, image [b, d] and text [b, d]: [b].

  `logit_scale` multiplies their products. With a `chunk` only [b, chunk] logits exist at a time,
  and on a mesh each device has its own rows of them: see `_over_texts`.
  """
  def step(rows, part):
    logits = logit_scale * _similarity(image, part[0])                       # b n
    return jnp.logaddexp(rows, jax.nn.logsumexp(logits, 1)), jax.nn.logsumexp(logits, 0)

  of_image, of_text = _over_texts(step, jnp.full(image.shape[0], -jnp.inf), text, chunk)
  return (of_image + of_text) / 2 - logit_scale * jnp.einsum("bd,bd->b", image, text)


def siglip_loss(image, text, logit_scale, logit_bias, chunk: int = 0):
  """Sigmoid loss (2303.15343 alg. 1) of each image, summed over the texts: [b]. As `clip_loss`."""
  def step(total, part):
    logits = logit_scale * _similarity(image, part[0]) + logit_bias          # b n
    sign = jnp.where(jnp.arange(image.shape[0])[:, None] == part[1][None], 1, -1)
    return total - jax.nn.log_sigmoid(sign * logits).sum(1), None

  return _over_texts(step, jnp.zeros(image.shape[0]), text, chunk)[0]


def nearest_text(image, text, chunk: int = 0):
  """The place of each image's most similar text, int [b]. As `clip_loss`."""
  def step(best, part):
    similarity = _similarity(image, part[0])                                 # b n
    new = similarity.max(1), jnp.take(part[1], similarity.argmax(1))
    return jax.tree.map(lambda n, b: jnp.where(new[0] > best[0], n, b), new, best), None

  b = image.shape[0]
  start = jnp.full(b, -jnp.inf), jnp.zeros(b, jnp.int32)
  return _over_texts(step, start, text, chunk)[0][1]
