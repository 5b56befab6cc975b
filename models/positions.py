"""Positions: which there are, and the tables that are added to tokens.

Tokens stand on a `grid`: (length,) of a text, (h, w) of patches, row-major.
"""

import math
from collections.abc import Callable, Mapping

import jax
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
# What attention is told of places, by `models.relative`; of these some are numbers that it adds.
BIASES = ("alibi", "relative", "buckets")
RELATIVE = ("rope", *BIASES)
KINDS = (*ABSOLUTE, *RELATIVE)


def check(kind: str, head_dim: int, axes: int, field: str = "positions = 'rope'"):
  """Raises ValueError where a head's features cannot be turned in pairs, alike on each axis."""
  if kind == "rope" and head_dim % (2 * axes):
    raise ValueError(f"model.{field} needs heads of a multiple of {2 * axes} features; "
                     f"width / heads is {head_dim}")


def _resize_torch(table, grid):
  from models import bicubic  # loaded where a config asks for it
  return bicubic.resize(table, grid)


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
