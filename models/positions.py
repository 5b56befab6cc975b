"""Position embeddings on a grid of patches: fixed tables and resampling of learned ones."""

from collections.abc import Callable, Mapping

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


# Fixed tables [n, width] for row-major patches; the two orders are both published.
FIXED: Mapping[str, Callable[[tuple[int, int], int], np.ndarray]] = {
  "sincos2d": lambda grid, width: _sincos_2d(grid, width, row_first=False),  # MAE, DiT
  "sincos2d_moco": lambda grid, width: _sincos_2d(grid, width, row_first=True),  # MoCo v3
}

KINDS = ("none", "learned", *FIXED)


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
