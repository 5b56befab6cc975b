"""DeepNorm (2203.00555): scales that keep a deep stack's updates small."""

import jax
import jax.numpy as jnp


def deepnorm(depth: int, cross: bool = False, decoder_depth: int = 0) -> tuple[float, float]:
  """DeepNorm's (alpha, beta) of a stack (2203.00555 table 1): norm(alpha x + f(x)), kernels x beta.

  Of one that stands alone; of a decoder that reads an encoder (`cross`); or of an encoder that a
  decoder of `decoder_depth` blocks reads.
  """
  if decoder_depth:
    both = (depth**4 * decoder_depth) ** (1 / 16)
    return 0.81 * both, 0.87 / both
  return ((3 if cross else 2) * depth) ** 0.25, ((12 if cross else 8) * depth) ** -0.25


def scaled(blocks: dict, beta: float) -> dict:
  """Initial parameters with kernels of values, outputs and MLP x beta (2203.00555 fig. 2)."""
  def scale(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("qkv_kernel"):
      return x * jnp.array([1, 1, beta]).reshape(1, 1, 3, 1, 1)              # depth d 3 k d/k
    return x * beta if name.endswith(("out/kernel", "up/kernel", "down/kernel")) else x
  return jax.tree.map_with_path(scale, blocks)
