"""What attention is told of the places of queries and keys: rotations, biases, who sees whom.

Tokens stand on a `grid`: (length,) of a text, (h, w) of patches, row-major.
"""

import functools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from models import masks
from models.positions import check, resample


def places(grid: tuple[int, ...], at=None):
  """Places int [1, n, axes] of all tokens of a grid, or [b, m, axes] of those `at` [b, m]."""
  table = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)   # n axes
  return table[None] if at is None else jnp.take(table, at, axis=0)


def rope(grid: tuple[int, ...], head_dim: int, *, at=None, prefix: int = 0,
         base: float | None = None, scale: float = 1.0):
  """Rotary positions (2104.09864 eq. 34): a function on queries or keys [b, n, k, head_dim].

  Features i and i + head_dim / 2 turn together by place / scale times a frequency, from 1 to
  1 / base. On a grid (2403.13298 sec. 3.2) the first half of these pairs turns by the row, the
  other by the column. `prefix` tokens that have no place come first and stay as they are.

  Args:
    grid: of which x has all tokens, or those `at` int [b or 1, m].
    base: 10^4 for texts and 100 for grids unless given.
    scale: of interpolation (2306.15595 eq. 4): how many times longer than trained a text may be.
  """
  check("rope", head_dim, len(grid))
  pairs = head_dim // (2 * len(grid))
  frequencies = (base or (10_000 if len(grid) == 1 else 100)) ** -(np.arange(pairs) / pairs)
  angles = places(grid)[0][:, :, None] / scale * frequencies.reshape(1, 1, -1)  # n axes pairs

  def table(function, still):                                                # b prefix+m 1 d/2
    rows = function(angles).reshape(len(angles), -1).astype(np.float32)
    rows = rows[None] if at is None else jnp.take(rows, at, axis=0)
    return jnp.pad(rows, ((0, 0), (prefix, 0), (0, 0)), constant_values=still)[:, :, None]

  cos, sin = table(np.cos, 1), table(np.sin, 0)

  def rotate(x):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
  return rotate


def dual_chunk(trained: int, head_dim: int, query_at, key_at, **kwargs):
  """Dual chunk attention (2402.17463 sec. 3): rope for texts longer than the `trained` tokens.

  Chunks are of s = 3/4 trained tokens. A query counts its place in its own chunk for keys there
  (eq. 2); for the chunk before, s more, up to trained - 1 (eq. 6); for any earlier, trained - 1
  (eq. 4); keys count their place in their chunk. For causal attention.

  Args:
    query_at, key_at: places of queries and keys in the text, int [1, q] and [1, n].
    **kwargs: `rope`'s base and scale.

  Returns:
    `rotate` and `bias` of `models.attention.Attention`.
  """
  size, turn = 3 * trained // 4, functools.partial(rope, (trained,), head_dim, **kwargs)
  inside = turn(at=query_at % size)
  after = turn(at=jnp.minimum(query_at % size + size, trained - 1))
  beyond = turn(at=jnp.full_like(query_at, trained - 1))
  chunks = (query_at // size)[:, :, None] - (key_at // size)[:, None]        # 1 q n

  def bias(query, key):                                                      # b k q n
    near, next_, far = (
      jnp.einsum("bqkd,bnkd->bkqn", rotate(query), key, preferred_element_type=jnp.float32)
      * head_dim**-0.5 for rotate in (inside, after, beyond))
    return jnp.where(chunks[:, None] == 0, 0, jnp.where(chunks[:, None] == 1, next_, far) - near)
  return inside, bias


def alibi_slopes(heads: int) -> np.ndarray:
  """Slopes [k] of ALiBi (2108.12409 sec. 3): 2^(-8 i / k) for k a power of two.

  Else those of the largest power of two p <= k, then every other one of 2 p's, as released.
  """
  power = 2 ** int(math.log2(heads))
  steps = [*np.arange(1, power + 1), *np.arange(1, 2 * (heads - power), 2) / 2]
  return 2.0 ** (-8 * np.array(steps) / power)


def alibi(param, delta, heads: int, **_):
  """Minus slope times distance (2108.12409 sec. 3), on a grid the straight one."""
  distance = jnp.sqrt(jnp.square(delta).sum(-1, dtype=jnp.float32))          # b q n
  return -distance[..., None] * alibi_slopes(heads).astype(np.float32).reshape(1, 1, 1, -1)


def relative_bias(param, delta, heads: int, grid: tuple[int, ...], made_for: tuple[int, ...], **_):
  """A learned number a head for each difference of places (2103.14030 eq. 4).

  The table [(2 h - 1) (2 w - 1), k] is resampled where the grid is not the one it is `made_for`.
  """
  extents = [tuple(2 * side - 1 for side in sides) for sides in (made_for, grid)]
  table = param("relative_bias", nn.initializers.normal(0.02), (math.prod(extents[0]), heads))
  row = sum((delta[..., i] + side - 1) * math.prod(extents[1][i + 1:])
            for i, side in enumerate(grid))
  return jnp.take(resample(table, *extents), row, axis=0)


def buckets_of(count: int, furthest: int = 128) -> np.ndarray:
  """T5's bucket of each distance from 0 to `furthest` (1910.10683 sec. 2.1): [furthest + 1].

  The first half of `count` buckets are a distance each, the others ever wider, by its logarithm.
  """
  distance, exact = np.arange(furthest + 1), count // 2
  log = np.log(np.maximum(distance, 1) / exact) / np.log(furthest / exact)
  wide = exact + (log * (count - exact) + 1e-9).astype(int)
  return np.where(distance < exact, distance, np.minimum(wide, count - 1))


def bucket_bias(param, delta, heads: int, causal: bool, count: int = 32, **_):
  """A learned number a head for each bucket of differences (1910.10683), summed over axes.

  Half of the buckets are for keys that come later, unless attention is causal.
  """
  table = param("bucket_bias", nn.initializers.normal(0.02), (delta.shape[-1], count, heads))
  buckets = buckets_of(count if causal else count // 2)
  distance = jnp.maximum(delta, 0) if causal else abs(delta)
  rows = jnp.take(buckets, jnp.minimum(distance, len(buckets) - 1), axis=0)
  if not causal:
    rows = rows + jnp.where(delta < 0, count // 2, 0)
  return sum(jnp.take(table[i], rows[..., i], axis=0) for i in range(delta.shape[-1]))


# (param, delta int [b or 1, q, n, axes] a query's place less a key's, ...) -> [b or 1, q, n, k],
# where param(name, init, shape) is a learned array. One for all blocks.
BIASES: Mapping[str, Callable] = {
  "alibi": alibi, "relative": relative_bias, "buckets": bucket_bias}


def told(stack, x, grid, keep, keys: int, index):
  """(mask, rotate, bias) of the places of queries x [b, q, d] and of `keys` keys; None: none.

  Tokens before those of a `grid` have no place: all see them, and they see all, with no bias.

  Args:
    stack: a bound `models.transformer.Transformer`; grid, keep and index are as of its `__call__`.
  """
  heads, head_dim, prefix = stack.heads, x.shape[-1] // stack.heads, 0
  if grid is None:  # a text
    grid = stack.grid or (keys,)
    query_at, key_at = index + jnp.arange(x.shape[1])[None], jnp.arange(keys)[None]  # 1 q, 1 n
  else:
    query_at = key_at = keep
    prefix = x.shape[1] - (math.prod(grid) if keep is None else keep.shape[1])
  rotate = bias = mask = None
  if stack.positions == "rope":
    how = dict(base=stack.rope_base, scale=stack.rope_scale)
    if stack.trained:
      rotate, bias = dual_chunk(stack.trained, head_dim, query_at, key_at, **how)
    else:
      rotate = rope(grid, head_dim, at=query_at, prefix=prefix, **how)
  if not (stack.causal or stack.window or stack.positions in BIASES):
    return mask, rotate, bias
  delta = places(grid, query_at)[:, :, None] - places(grid, key_at)[:, None]  # b q n axes
  around = ((0, 0), (0, 0), (prefix, 0), (prefix, 0))
  if stack.positions in BIASES:
    bias = BIASES[stack.positions](stack.param, delta, heads=heads, grid=grid,
                                   made_for=stack.grid or grid, causal=stack.causal)
    bias = jnp.pad(jnp.moveaxis(bias, -1, 1), around)                        # b k q n
  seen = [masks.causal(delta)] if stack.causal else []
  seen += [masks.window(delta, stack.window)] if stack.window else []
  if seen:
    mask = jnp.pad(functools.reduce(jnp.logical_and, seen), around, constant_values=True)
  return mask, rotate, bias
