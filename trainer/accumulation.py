"""A batch's gradient in parts, one after another, with the memory of one of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainer.parts import part_of, with_part


def parts(batch, n: int):
  """[n, ...] of a batch. Part j has rows j, j + n, ...: so each device keeps its own rows."""
  return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)


def accumulated(gradients: Callable, phase, stop: Callable, n: int) -> Callable:
  """`gradients`, ((loss, (extra, metrics)), gradients) of a batch, by n parts of it.

  A loss that compares examples with each other (`methods.method.Contrast`) is that of the whole
  batch; of any other, and of its gradient, it is the mean over the parts.
  """
  return _contrast(phase, stop, n) if hasattr(phase.loss, "compare") else _mean(gradients, phase, n)


def _mean(gradients: Callable, phase, n: int) -> Callable:
  def run(params, extra, batch, rng, step):
    def one(carry, part):
      extra, grads = carry
      index, part = part
      (loss, (extra, metrics)), new = gradients(params, extra, part,
                                                jax.random.fold_in(rng, index), step)
      return (extra, jax.tree.map(jnp.add, grads, new)), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, part_of(params, phase.part))
    (extra, grads), (loss, metrics) = jax.lax.scan(
      one, (extra, zeros), (jnp.arange(n), parts(batch, n)))
    mean = jax.tree.map(lambda x: x.mean(0), (loss, metrics))
    return (mean[0], (extra, mean[1])), jax.tree.map(lambda g: g / n, grads)

  return run


def _contrast(phase, stop: Callable, n: int) -> Callable:
  """Gradient caching (2101.06983 sec. 3.2): the features of all parts, their gradients by the whole
  batch's loss, and then each part once more, for what of that belongs to its parameters."""
  embed, compare = phase.loss.embed, phase.loss.compare

  def joined(features):
    """n b/n ... -> b ..., each row where it was."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), features)

  def run(params, extra, batch, rng, step):
    own, indexed = part_of(params, phase.part), (jnp.arange(n), parts(batch, n))

    def features_of(own, extra, part):
      index, part = part
      return embed(with_part(params, stop(own)), extra, part, jax.random.fold_in(rng, index), step)

    def first(carry, part):
      features, carry = features_of(own, carry, part)
      return carry, features

    def whole(own, features):
      return compare(with_part(params, stop(own)), joined(features), step)

    def second(grads, part):
      indexed, features = part
      _, pull, _ = jax.vjp(lambda own: features_of(own, extra, indexed), own, has_aux=True)
      return jax.tree.map(jnp.add, grads, pull(features)[0]), None

    after, features = jax.lax.scan(first, extra, indexed)
    (loss, metrics), (direct, of_features) = jax.value_and_grad(
      whole, argnums=(0, 1), has_aux=True)(own, features)
    grads, _ = jax.lax.scan(second, direct, (indexed, of_features))
    return (loss, (after, metrics)), grads

  return run
