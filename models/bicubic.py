"""PyTorch's bicubic resampling of a table, which differs from JAX's."""

import jax
import jax.numpy as jnp
import numpy as np


def keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
  """The cubic convolution kernel of Keys (1981, eq. 4) with free parameter a, support [-2, 2]."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def torch_bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
  """PyTorch's bicubic, a matrix [size_out, size_in]: a = -0.75, no anti-aliasing, edges repeat."""
  centres = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  taps = np.floor(centres).astype(int).reshape(-1, 1) + np.arange(-1, 3).reshape(1, -1)
  weights = keys_cubic(centres.reshape(-1, 1) - taps, a=-0.75)              # out 4
  matrix = np.zeros((size_out, size_in))
  np.add.at(matrix, (np.arange(size_out).reshape(-1, 1), np.clip(taps, 0, size_in - 1)), weights)
  return matrix.astype(np.float32)


def resize(table, grid: tuple[int, int]):
  """table [h, w, d] -> [*grid, d]."""
  rows, columns = (torch_bicubic_matrix(i, o) for i, o in zip(table.shape[:2], grid))
  return jnp.einsum("hwd,yh,xw->yxd", table, rows, columns,
                    precision=jax.lax.Precision.HIGHEST)
