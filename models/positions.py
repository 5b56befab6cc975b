"""Positions: tables that are added to tokens, and what attention is told of places.

Tokens stand on a `grid`: (length,) of a text, (h, w) of patches, row-major.
"""

import functools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def sincos_1d(positions: np.ndarray, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """[sin | cos] of positions times frequencies (1706.03762 sec. 3.5): [n] -> [n, width]."""
  omega = temperature ** -(np.arange(width // 2, dtype=np.float64) / (width // 2))
  angles = positions.reshape(-1, 1) * omega.reshape(1, -1)                   # n width/2
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _sincos_2d(grid: tuple[int, int], width: int, row_first: bool) -> np.ndarray:
  if width % 4:
    raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}")
  rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
  halves = [sincos_1d(axis.ravel().astype(np.float64), width // 2) for axis in
            ((rows, columns) if row_first else (columns, rows))]
  return np.concatenate(halves, axis=1).astype(np.float32)                   # n width


def sinusoidal(grid: tuple[int, ...], width: int) -> np.ndarray:
  """`sincos_1d` of places counted row by row: [n, width]."""
  if width % 2:
    raise ValueError(f"sinusoidal positions need a width divisible by 2, got {width}")
  return sincos_1d(np.arange(math.prod(grid), dtype=np.float64), width).astype(np.float32)


# Fixed tables [n, width] for row-major patches; the two orders of 2-D are both published.
FIXED: Mapping[str, Callable[[tuple[int, ...], int], np.ndarray]] = {
  "sinusoidal": sinusoidal,
  "sincos2d": lambda grid, width: _sincos_2d(grid, width, row_first=False),  # MAE, DiT
  "sincos2d_moco": lambda grid, width: _sincos_2d(grid, width, row_first=True),  # MoCo v3
}
ABSOLUTE = ("none", "learned", *FIXED)  # added to tokens


def _keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
  """The cubic convolution kernel of Keys (1981, eq. 4) with free parameter a, support [-2, 2]."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def torch_bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
  """PyTorch's bicubic, a matrix [size_out, size_in]: a = -0.75, no anti-aliasing, edges repeat."""
  centres = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  taps = np.floor(centres).astype(int).reshape(-1, 1) + np.arange(-1, 3).reshape(1, -1)
  weights = _keys_cubic(centres.reshape(-1, 1) - taps, a=-0.75)              # out 4
  matrix = np.zeros((size_out, size_in))
  np.add.at(matrix, (np.arange(size_out).reshape(-1, 1), np.clip(taps, 0, size_in - 1)), weights)
  return matrix.astype(np.float32)


def _resize_torch(table, grid):
  rows, columns = (torch_bicubic_matrix(i, o) for i, o in zip(table.shape[:2], grid))
  return jnp.einsum("hwd,yh,xw->yxd", table, rows, columns,
                    precision=jax.lax.Precision.HIGHEST)


RESAMPLE: Mapping[str, Callable] = {
  # "antialias" is bicubic with a = -0.5 and a kernel that widens when the grid shrinks
  "antialias": lambda table, grid: jax.image.resize(table, (*grid, table.shape[-1]), "cubic"),
  "torch": _resize_torch,
}


def resample(table, grid_in: tuple[int, int], grid_out: tuple[int, int], method: str = "antialias"):
  """Learned positions [n_in, d], row-major on `grid_in`, resampled to `grid_out`: [n_out, d].

  The same grid returns the same array, bit for bit.
  """
  if tuple(grid_in) == tuple(grid_out):
    return table
  table = table.reshape(*grid_in, -1)                                        # h w d
  return RESAMPLE[method](table, grid_out).reshape(grid_out[0] * grid_out[1], -1)


# --- Relative positions: what attention is told of the places of queries and keys -----------------

def places(grid: tuple[int, ...], at=None):
  """Places int [1, n, axes] of all tokens of a grid, or [b, m, axes] of those `at` [b, m]."""
  table = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)   # n axes
  return table[None] if at is None else jnp.take(table, at, axis=0)


def check(kind: str, head_dim: int, axes: int, field: str = "positions = 'rope'"):
  """Raises ValueError where a head's features cannot be turned in pairs, alike on each axis."""
  if kind == "rope" and head_dim % (2 * axes):
    raise ValueError(f"model.{field} needs heads of a multiple of {2 * axes} features; "
                     f"width / heads is {head_dim}")


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
RELATIVE = ("rope", *BIASES)
KINDS = (*ABSOLUTE, *RELATIVE)
