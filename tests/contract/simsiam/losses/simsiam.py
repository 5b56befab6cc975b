"""The loss of SimSiam (2011.10566 eq. 1 and 2)."""

import jax
import jax.numpy as jnp


def negative_cosine(p, z):
  """p, z [b, d] -> [b]: D(p, stopgrad(z)), -1 where they point the same way."""
  p, z = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (p, jax.lax.stop_gradient(z)))
  return -(p * z).sum(-1)
