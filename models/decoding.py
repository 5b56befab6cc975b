"""Texts from a model of the next token: greedy, sampled, or by beam search.

A step (cache, token int [b], index int []) -> (logits [b, v], cache) says what follows `token`,
which stands at place `index`. What a cache is, only the step knows: any arrays with an axis for
texts. Decoding begins with a token that is no part of the text, ends a text at its first `eos_id`,
puts `pad_id` after it, and takes `length` steps: to stop when all texts have ended, the devices of
a mesh would have to agree at each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def greedy(rng, logits):
  """The likeliest token: logits [b, v] -> int [b]."""
  return logits.argmax(-1)


def nucleus(logits, top_p: float):
  """Logits [b, v] with -inf for all but the likeliest tokens that together reach `top_p`.

  They are the smallest such set (1904.09751 eq. 2), of equally likely tokens the first.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  p = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
  wanted = jnp.cumsum(p, axis=-1) - p < top_p  # what is likelier does not reach it
  return jnp.where(jnp.take_along_axis(wanted, jnp.argsort(order, axis=-1), axis=-1),
                   logits, -jnp.inf)


def sampler(temperature: float = 1.0, top_p: float = 1.0) -> Callable:
  """(rng, logits [b, v]) -> int [b], drawn from the nucleus of softmax(logits / temperature)."""
  def choose(rng, logits):
    return jax.random.categorical(rng, nucleus(logits / temperature, top_p))
  return choose


def decode(step: Callable, cache, first, length: int, *, eos_id: int, pad_id: int,
           choose: Callable = greedy, rng=None):
  """One text for each row of `first`, int [b]: what `choose` takes of (rng, logits) at each place.

  Returns:
    (tokens int32 [b, length], log-probabilities float32 [b] of the texts as the model has them).
  """
  rng = jax.random.key(0) if rng is None else rng

  def extend(carry, index):
    cache, token, log_p, ended = carry
    logits, cache = step(cache, token, index)
    logits = logits.astype(jnp.float32)
    token = choose(jax.random.fold_in(rng, index), logits).astype(jnp.int32)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    token = jnp.where(ended, pad_id, token)
    log_p = log_p + jnp.where(ended, 0, each)
    return (cache, token, log_p, ended | (token == eos_id)), token

  b = first.shape[0]
  start = (cache, first.astype(jnp.int32), jnp.zeros(b), jnp.zeros(b, bool))
  (_, _, log_p, _), tokens = jax.lax.scan(extend, start, jnp.arange(length))
  return tokens.T, log_p


def length_penalty(count, alpha: float):
  """What a text's log-probability is divided by: GNMT's lp(Y) (1609.08144 eq. 14), 1 for alpha 0.

  `count` is its number of tokens, the end of text included.
  """
  return ((5 + count) / 6) ** alpha


def beam(step: Callable, cache, first, length: int, *, eos_id: int, pad_id: int, beams: int,
         alpha: float = 0.0, axis: int = 0):
  """The best of `beams` texts at a time, by log-probability over `length_penalty`.

  A text that has ended keeps its place among the best until others push it out. So one beam is
  greedy decoding, and as many beams as there are texts find the best one. GNMT's coverage penalty
  is left out.

  Args:
    first: int [b].
    cache: its arrays have b texts on `axis`; the step is given, and gives, b * beams of them.

  Returns:
    (tokens int32 [b, beams, length], scores float32 [b, beams]), the best first. A score of -inf is
    that of a beam which there was no text for.
  """
  b = first.shape[0]

  def select(x, parent):  # of each row's own beams, so that no row of another device is looked at
    shape = x.shape
    x = x.reshape(*shape[:axis], b, beams, *shape[axis + 1:])
    return jax.vmap(lambda x, parent: jnp.take(x, parent, axis), (axis, 0), axis)(
      x, parent).reshape(shape)

  def extend(carry, index):
    cache, token, tokens, log_p, count, ended = carry
    logits, cache = step(cache, token.reshape(-1), index)
    v = logits.shape[-1]
    each = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, beams, v)
    nothing = jnp.where(jnp.arange(v) == pad_id, 0, -jnp.inf).reshape(1, 1, v)
    total = log_p[..., None] + jnp.where(ended[..., None], nothing, each)    # b m v
    count = jnp.where(ended, count, index + 1)
    score = total / length_penalty(count, alpha)[..., None]
    # By sorting, which stays where a row is: a top_k would gather the batch of a mesh.
    best = jnp.argsort(-score.reshape(b, -1), axis=1)[:, :beams]             # b m
    parent, token = jnp.divmod(best, v)
    log_p = jnp.take_along_axis(total.reshape(b, -1), best, axis=1)
    tokens, count, ended = jax.vmap(lambda x, at: jax.tree.map(lambda a: a[at], x))(
      (tokens, count, ended), parent)
    tokens = tokens.at[:, :, index].set(token)
    return (jax.tree.map(lambda x: select(x, parent), cache), token, tokens, log_p, count,
            ended | (token == eos_id)), None

  start = (jax.tree.map(lambda x: jnp.repeat(x, beams, axis), cache),
           jnp.repeat(first.astype(jnp.int32)[:, None], beams, 1),
           jnp.full((b, beams, length), pad_id, jnp.int32),
           jnp.full((b, beams), -jnp.inf).at[:, 0].set(0), jnp.zeros((b, beams), jnp.int32),
           jnp.zeros((b, beams), bool))
  _, _, tokens, log_p, count, _ = jax.lax.scan(extend, start, jnp.arange(length))[0]
  return tokens, log_p / length_penalty(count, alpha)
