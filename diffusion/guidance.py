"""Classifier-free guidance (2207.12598 eq. 6): a network with a condition becomes a guided one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from diffusion.paths import expand


def guided(network: Callable, condition, null, scale, interval: tuple[float, float] | None = None,
           channels: int | None = None) -> Callable:
  """`network(x, t)` = null + scale (conditional - null), in one call of twice the batch.

  It mixes raw outputs, so `scale` means the same for every prediction. At scale 0 the output is the
  unconditional one and at 1 the conditional one, bit for bit; given as Python numbers, those cost
  one call of the batch.

  Args:
    network: (x [b, ...], t [b], condition) -> output [b, ...].
    condition: arrays [b, ...], such as labels.
    null: likewise, what stands for none given.
    scale: 1 + w of eq. 6; a number or one an example [b], traced or not.
    interval: (least, most) times between which to guide; outside, the output is the conditional one
      (2404.07724). Times as the network is given them: c_noise for prediction "edm".
    channels: how many leading channels to guide; the others are the conditional ones (unless the
      scale is 0), as learned variances should be; `methods.diffusion` sees to that. DiT's
      published code guides 3 of its 4 latents. None: all.
  """
  if interval is not None and not interval[0] < interval[1]:
    raise ValueError(f"interval = {interval}: expected (least, most) times")
  if isinstance(scale, (int, float)) and (scale == 1 or (scale == 0 and interval is None)):
    return lambda x, t: network(x, t, condition if scale == 1 else null)

  def by_example(a, b):  # neighbours, so that a sharded batch stays where it is
    return rearrange(jnp.stack([a, b]), "two b ... -> (b two) ...")

  def apply(x, t):
    both = network(by_example(x, x), by_example(t, t), jax.tree.map(by_example, condition, null))
    both = rearrange(both, "(b two) ... -> two b ...", two=2)
    weight = jnp.asarray(scale, both.dtype)
    if interval is not None:
      weight = jnp.where((t >= interval[0]) & (t <= interval[1]), weight, 1)
    given, none = both
    weight = expand(weight, given)
    mixed = (none + weight * (given - none))[..., :channels]
    mixed = given.at[..., :channels].set(mixed)
    return jnp.where(weight == 1, given, jnp.where(weight == 0, none, mixed))

  return apply
