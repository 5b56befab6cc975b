"""Batch normalisation (1502.03167) with statistics over groups of the global batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
  """(x - mean) / sqrt(var + epsilon) * scale + bias for each channel; statistics in float32.

  In training each of `groups` runs of consecutive rows has its own statistics. Under jit a batch is
  the global one, so one group is SyncBN, and n groups are what n GPUs of PyTorch compute, on
  however many devices. MoCo v1 and v2 need several and a shuffle: shared statistics tell a query
  which key is its own (1911.05722 sec. 3.3).

  `batch_stats` holds the running mean and (unbiased) variance that evaluation uses: the first
  group's, as PyTorch's DistributedDataParallel keeps those of rank 0.
  """

  groups: int = 1
  momentum: float = 0.9  # running = momentum * running + (1 - momentum) * batch
  epsilon: float = 1e-5
  affine: bool = True  # with scale and bias
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, *, train: bool):
    """x [b, ..., c] -> the same shape in `dtype`.

    Raises ValueError where the groups do not divide b, or leave a channel one value to normalise.
    """
    channels, groups = x.shape[-1:], self.groups if train else 1
    count = x.size // (groups * x.shape[-1])  # values of a channel in a group
    if x.shape[0] % groups or train and count < 2:
      raise ValueError(f"model.bn_groups = {groups}: does not split a batch of shape {x.shape} "
                       "into equal groups of at least 2 values a channel")
    running = {"mean": self.variable("batch_stats", "mean", jnp.zeros, channels),
               "var": self.variable("batch_stats", "var", jnp.ones, channels)}
    y = x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:])              # g b/g ... c
    ones = (1,) * (y.ndim - 1)
    if train:
      within = tuple(range(1, y.ndim - 1))
      mean, var = y.mean(within, keepdims=True), y.var(within, keepdims=True)  # g 1 ... c
      if not self.is_initializing():
        first = {"mean": mean[0].ravel(), "var": var[0].ravel() * count / (count - 1)}
        for name, batch in first.items():
          running[name].value = (self.momentum * running[name].value
                                 + (1 - self.momentum) * batch)
    else:
      mean, var = (running[name].value.reshape(*ones, -1) for name in ("mean", "var"))
    y = (y - mean) * jax.lax.rsqrt(var + self.epsilon)
    if self.affine:
      scale = self.param("scale", self.scale_init, channels)
      bias = self.param("bias", nn.initializers.zeros, channels)
      y = y * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)
    return y.reshape(x.shape).astype(self.dtype)
