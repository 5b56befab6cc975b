"""Adafactor: a second moment of rows and columns."""

import jax
import optax

from trainer.layerwise import per_layer


def make(learning_rate, weight_decay, mask, *, decay_rate: float = 0.8,
         momentum: float = 0.9, clipping_threshold: float | None = None,
         beta2_cap: float = 0.999, min_dim_size_to_factor: int = 32):
  """Adafactor as 2106.04560 sec. 3.4 and its authors' code have it.

  No scale by the parameter's own and no clipping of the update; a first moment, not debiased.

  Args:
    decay_rate: the second moment's beta2 at step t is 1 - t^-decay_rate.
    momentum: of the first moment; 0 = none.
    clipping_threshold: root mean square that an update is clipped to; None = not clipped.
    beta2_cap: beta2 is this at most.
    min_dim_size_to_factor: the second moment is factored where two sides are at least this.
  """
  return per_layer(optax.chain(
    optax.scale_by_factored_rms(
      min_dim_size_to_factor=min_dim_size_to_factor, decay_rate=decay_rate,
      decay_rate_fn=lambda step, rate: jax.numpy.minimum(
        beta2_cap, 1 - (step + 1).astype(jax.numpy.float32) ** -rate)),
    optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity(),
    optax.ema(momentum, debias=False) if momentum else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate)))
