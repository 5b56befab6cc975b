"""AdamW, with and without the correction of its first steps."""

import jax
import optax


def _scale_by_raw_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """m / (sqrt(v) + eps) of moments that are not debiased (1810.04805's code)."""
  def init(params):
    return optax.ScaleByAdamState(jax.numpy.zeros((), jax.numpy.int32),
                                  optax.tree.zeros_like(params), optax.tree.zeros_like(params))

  def update(updates, state, params=None):
    m = optax.tree.update_moment(updates, state.mu, b1, 1)
    v = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    return (jax.tree.map(lambda m, v: m / (jax.numpy.sqrt(v) + eps), m, v),
            optax.ScaleByAdamState(state.count + 1, m, v))

  return optax.GradientTransformation(init, update)


def make(learning_rate, weight_decay, mask, *, b1: float = 0.9, b2: float = 0.999,
         eps: float = 1e-8, debias: bool = True):
  """AdamW (1711.05101).

  Args:
    b1, b2: decay of the first and the second moment.
    eps: added to the root of the second.
    debias: whether both are divided by what their start at 0 costs; 1810.04805's code does not.
  """
  if debias:
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
  return optax.chain(_scale_by_raw_adam(b1, b2, eps),
                     optax.add_decayed_weights(weight_decay, mask),
                     optax.scale_by_learning_rate(learning_rate))
