"""Rates by depth: how far a layer is from the output, and which blocks are trained at all."""

import re

import jax
import numpy as np
import optax

from trainer.parts import path_name

# What stands before the first block: embeddings, tokens, positions.
BEFORE_BLOCKS = (r"(^|/)(embed|embed_norm|convolutions|position|segment|cls|cls_position|registers"
                 r"|input_norm)(/|$)")


def by_depth(params, decay: float, tuned: int | None):
  """Multipliers of the rate, one a parameter; of stacked blocks an array [depth].

  `decay` to the power of how many layers are above, as BEiT has it (2106.08254 appendix;
  2111.06377 table 9): 0 for what follows the blocks, depth + 1 for what is before them. 0 for what
  is before the last `tuned` blocks (None: all are tuned), as in 2111.06377 figure 9.

  Raises ValueError where there are no stacked blocks, stacks of several depths, or fewer blocks.
  """
  def in_blocks(path):
    return "blocks" in path_name(path).split("/")

  if decay == 1 and tuned is None:
    return jax.tree.map(lambda _: 1.0, params)
  depths = {x.shape[0] for path, x in jax.tree.leaves_with_path(params) if in_blocks(path)}
  if len(depths) != 1 or not 0 <= (tuned or 0) <= max(depths):
    raise ValueError(f"optimizer.layer_decay = {decay} and optimizer.tuned_blocks = {tuned} need a "
                     f"model of one stack of blocks; depths here: {sorted(depths) or 'none'}")
  depth, = depths
  scales = decay ** np.arange(depth + 1, -1, -1.0)  # before the blocks, of each, after them
  scales[:0 if tuned is None else depth + 1 - tuned] = 0

  def leaf(path, _):
    if in_blocks(path):
      return scales[1:-1]
    return float(scales[0 if re.search(BEFORE_BLOCKS, path_name(path)) else -1])
  return jax.tree.map_with_path(leaf, params)


def scale_by_depth(decay: float, tuned: int | None) -> optax.GradientTransformation:
  """Multiplies updates as `by_depth` says: each part has a rate of its own."""
  def init(params):
    by_depth(params, decay, tuned)  # its errors, now
    return optax.EmptyState()

  def update(updates, state, params=None):
    return jax.tree.map(
      lambda u, scale: u * jax.numpy.reshape(jax.numpy.asarray(scale, u.dtype),
                                             (-1,) + (1,) * (u.ndim - 1) if np.ndim(scale) else ()),
      updates, by_depth(updates, decay, tuned)), state

  return optax.GradientTransformation(init, update)


def stop_before(params, tuned: int):
  """`params` with no gradient in what is before the last `tuned` blocks."""
  def leaf(x, scale):
    fixed = int((np.asarray(scale) == 0).sum())                              # of stacked blocks
    return x if not fixed else jax.lax.stop_gradient(x) if np.ndim(scale) == 0 else (
      jax.numpy.concatenate([jax.lax.stop_gradient(x[:fixed]), x[fixed:]]))
  return jax.tree.map(leaf, params, by_depth(params, 1.0, tuned))
