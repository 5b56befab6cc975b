"""Norms, activations and the MLP that every network of tokens is made of."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import kernels


class LayerNorm(nn.Module):
  """`layer_norm` with learned scale and bias: x as it comes, statistics in float32."""

  epsilon: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return kernels.layer_norm(x, scale, bias, self.epsilon, self.dtype)


# (epsilon=, dtype=, name=) -> a function of x [..., d]
NORMS: Mapping[str, Callable[..., Callable]] = {
  "layernorm": LayerNorm,  # 1607.06450
  "rmsnorm": functools.partial(nn.RMSNorm, use_fast_variance=False),  # 1910.07467
  "none": lambda **_: lambda x: x,
}

# What the kernels of blocks start from; None: each layer's own Xavier.
KERNEL_INITS: Mapping[str, nn.initializers.Initializer | None] = {
  "xavier": None,
  "normal": nn.initializers.normal(0.02),  # as timm starts a ViT
  # PyTorch's linear layers; its attention has Xavier's over query, key and value as one matrix.
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  "truncated": nn.initializers.truncated_normal(0.02),  # cut at two deviations: 1810.04805's code
}


def head_kernel(std: float) -> nn.initializers.Initializer:
  """What the kernel of a linear head starts from: normal of this spread, 0 for zeros."""
  return nn.initializers.normal(std) if std else nn.initializers.zeros


# Of gated layers, what the gate goes through (2002.05202 eq. 5 and 6).
GATES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "glu": nn.sigmoid,
  "bilinear": lambda x: x,
  "reglu": nn.relu,
  "geglu": kernels.gelu,
  "swiglu": nn.silu,
}

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": kernels.gelu,
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "silu": nn.silu,
  **GATES,
}


def gated_hidden(width: int, hidden: int) -> int:
  """Hidden features that give a gated MLP the parameters of a plain one with `hidden`.

  2/3 of them (2002.05202 sec. 2), less what biases take; even, in eights where that is within 1%.
  """
  equal = hidden * (2 * width + 1) / (3 * width + 2)
  step = 8 if equal >= 400 else 2
  return max(step, step * round(equal / step))


def side_by_side(rng, shape, dtype=jnp.float32):
  """Xavier's uniform for two matrices that are one [d, 2 hidden]: by the fans of each."""
  init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=2,
                                          batch_axis=1)
  return init(rng, (shape[0], 2, shape[1] // 2), dtype).reshape(shape)


# `nn.DenseGeneral` of many tokens: its parameters, its result, faster gradients.
Dense = functools.partial(nn.DenseGeneral, dot_general=kernels.dot_general)


class Mlp(nn.Module):
  """Two dense layers with an activation between them, or a gate on the first (2002.05202)."""

  hidden: int  # features; of a gated one `gated_hidden` says how many
  activation: str = "gelu"  # a key of ACTIVATIONS
  dropout: float = 0.0  # rate, [0, 1)
  dtype: jnp.dtype = jnp.float32
  kernel_init: str = "xavier"  # a key of KERNEL_INITS

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    width, activation = x.shape[-1], ACTIVATIONS[self.activation]
    init = KERNEL_INITS[self.kernel_init]
    xavier = init or nn.initializers.xavier_uniform()
    dense = functools.partial(Dense, dtype=self.dtype)
    if self.activation in GATES:
      first = side_by_side if self.kernel_init in ("xavier", "torch") else init
      h = dense((2, gated_hidden(width, self.hidden)), kernel_init=first,
                name="up")(x)                                                # ... 2 hidden
      h = activation(h[..., 0, :]) * h[..., 1, :]                            # ... hidden
    else:
      h = activation(dense(self.hidden, kernel_init=xavier, name="up")(x))   # ... hidden
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return dense(width, kernel_init=xavier, name="down")(h)
