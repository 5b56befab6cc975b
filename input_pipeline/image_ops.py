"""Operations that move an image's pixels, written for one image and meant to be vmapped.

Images are float32 [h, w, c] in [0, 1]. What changes colours is in `colours`, what covers a part in
`erasing`: a recipe loads what it names.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def affine_matrix(angle, shear_x, shear_y, move_x, move_y, scale=1.0):
  """Rotation (radians) @ shear (slopes) / scale, then a move (pixels): [3, 3].

  It maps an output place (x, y, 1), counted from the image's centre, to the input place seen there.
  """
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.array([[(c - s * shear_y) / scale, (c * shear_x - s) / scale, move_x],
                    [(s + c * shear_y) / scale, (s * shear_x + c) / scale, move_y],
                    [0, 0, 1]])


def warp(image, matrix, fill=None, order=1):
  """Samples `image` at `matrix` @ place; outside is `fill`, or the nearest edge.

  Bilinearly, or with `order` 0 the nearest pixel.
  """
  h, w, _ = image.shape
  centre = np.array([(w - 1) / 2, (h - 1) / 2, 0], np.float32).reshape(3, 1, 1)
  y, x = np.mgrid[:h, :w].astype(np.float32)
  grid = np.stack([x, y, np.ones_like(x)]) - centre  # xy1 h w
  # The accelerators' default precision would misplace pixels by up to half of one.
  x, y, _ = jnp.einsum("ij,jhw->ihw", matrix, grid, precision="highest") + centre
  sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=order,
                             mode="nearest" if fill is None else "constant")
  offset = 0.0 if fill is None else fill  # the constant of "constant" is 0
  return jax.vmap(sample, -1, -1)(image - offset) + offset


def random_matrix(key, h, w, *, degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0):
  """A random `affine_matrix` for images of h x w pixels; the keywords are `random_affine`'s."""
  u = jax.random.uniform(key, (5,), minval=-1, maxval=1)
  return affine_matrix(
      u[0] * math.radians(degrees), jnp.tan(u[1] * math.radians(shear)), 0.0, u[2] * translate * w,
      u[3] * translate * h, scale[0] + (scale[1] - scale[0]) * (u[4] + 1) / 2)


def random_affine(key, image, *, degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0):
  """One random affine resample; the edge fills what comes into view.

  Args:
    degrees: rotation, uniform in +-degrees. translate: shift, +-share of the side, per axis.
    scale: (low, high) factor, uniform. shear: of x along y, uniform in +-shear degrees.
  """
  return warp(image, random_matrix(key, *image.shape[:2], degrees=degrees, translate=translate,
                                   scale=scale, shear=shear))
