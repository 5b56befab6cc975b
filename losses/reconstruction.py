"""Masked image reconstruction (MAE, 2111.06377 sec. 3, "Reconstruction target")."""

import jax.numpy as jnp


def patch_statistics(patches):
  """Mean and standard deviation of each patch, [..., 1]: unbiased variance, plus 1e-6."""
  patches = patches.astype(jnp.float32)
  return (patches.mean(-1, keepdims=True),
          jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6))


def masked_mse(pred, target, mask):
  """Mean squared error over removed patches, per example: [b].

  pred, target [b, n, p*p*c]; mask [b, n], 1 = removed and counted, 0 = kept.
  """
  error = jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32)).mean(-1)  # b n
  return (error * mask).sum(-1) / mask.sum(-1)
