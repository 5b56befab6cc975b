"""Layers of a stacked parameter, one by one."""

import jax
import optax

from trainer.parts import path_name


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Shows `tx` each layer of a stacked parameter as one of its own.

  For optimizers whose update depends on a whole tensor's norm or shape.
  """
  def split(tree):
    def leaf(path, x):
      return [x[i] for i in range(x.shape[0])] if "blocks" in path_name(path).split("/") else x
    return jax.tree.map_with_path(leaf, tree)

  def join(tree):
    return jax.tree.map(lambda x: jax.numpy.stack(x) if isinstance(x, list) else x, tree,
                        is_leaf=lambda x: isinstance(x, list))

  def update(updates, state, params=None):
    updates, state = tx.update(split(updates), state, split(params))
    return join(updates), state

  return optax.GradientTransformation(lambda params: tx.init(split(params)), update)
