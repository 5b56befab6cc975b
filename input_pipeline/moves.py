"""What lies on an image moves as augmentation moves it: one example at a time, under vmap."""

import jax
import jax.numpy as jnp

from input_pipeline import image_ops


def move(x, kind: str, size: tuple[int, int], matrix=None, mirrored=None):
  """A mask or depth [h, w], frames [t, h, w, c], boxes [m, 4] or points [m, 2] of an image.

  Args:
    size: (h, w) of the image.
    matrix: what `image_ops.warp` sampled the image at, if it did.
    mirrored: bool [], whether the image was then mirrored left and right; None = never.
  """
  if kind in ("boxes", "points"):
    return _move_places(x, size, matrix, mirrored)
  if matrix is not None and kind == "frames":
    frames = jax.vmap(image_ops.warp, (0, None))(x.astype(jnp.float32), matrix)
    x = jnp.round(frames).astype(x.dtype)
  elif matrix is not None:
    x = image_ops.warp(x[..., None], matrix, order=0)[..., 0].astype(x.dtype)
  if mirrored is None:
    return x
  axis = 2 if kind == "frames" else 1
  return jnp.where(mirrored, jnp.flip(x, axis), x)


def _move_places(rows, size, matrix, mirrored):
  """Boxes become the upright ones around what they enclosed; what leaves the image is -1."""
  h, w = size
  there = (rows != -1).any(-1)
  top_left, bottom_right = rows[:, :2], rows[:, -2:]
  corners = jnp.stack([top_left, jnp.stack([top_left[:, 0], bottom_right[:, 1]], -1),
                       jnp.stack([bottom_right[:, 0], top_left[:, 1]], -1), bottom_right], 1)
  y, x = corners[..., 0], corners[..., 1]                                    # m 4
  if matrix is not None:  # it leads from where something is seen to where it was
    xy = jnp.stack([x - w / 2 - matrix[0, 2], y - h / 2 - matrix[1, 2]]).reshape(2, -1)
    x, y = jnp.linalg.solve(matrix[:2, :2], xy).reshape(2, *x.shape)
    x, y = x + w / 2, y + h / 2
  if mirrored is not None:
    x = jnp.where(mirrored, w - x, x)
  if rows.shape[-1] == 2:
    inside = (y[:, 0] >= 0) & (y[:, 0] <= h) & (x[:, 0] >= 0) & (x[:, 0] <= w)
    return jnp.where((there & inside)[:, None], jnp.stack([y[:, 0], x[:, 0]], -1), -1.0)
  low = jnp.stack([y.min(1).clip(0, h), x.min(1).clip(0, w)], -1)
  high = jnp.stack([y.max(1).clip(0, h), x.max(1).clip(0, w)], -1)
  there &= (high > low).all(-1)
  return jnp.where(there[:, None], jnp.concatenate([low, high], -1), -1.0)
