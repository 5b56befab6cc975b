"""Multi-head attention: to itself, to a memory, and token by token with a cache."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import kernels
from models.layers import KERNEL_INITS, NORMS, Dense


def cudnn(query, key, value, *, bias=None, mask=None):
  """cuDNN's fused attention. Raises ValueError on what it cannot do (float32, some lengths)."""
  if query.dtype == jnp.float32:
    raise ValueError("model.attention = 'cudnn' needs config.dtype = 'bfloat16'")
  if mask is not None:  # it takes one for all queries, but not one of size 1
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
  bias = None if bias is None else bias.astype(query.dtype)
  try:
    return jax.nn.dot_product_attention(query, key, value, bias, mask, implementation="cudnn")
  except NotImplementedError as error:
    raise ValueError(f"model.attention = 'cudnn': {error}") from error


ATTENTION: Mapping[str, Callable[..., jax.Array]] = {
  # (query [b, q, k, d], key and value [b, n, k, d], bias=..., mask=...) -> [b, q, k, d]
  "auto": kernels.attention,
  "xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
  "cudnn": cudnn,
}


def project(x, kernel, offsets):
  """x [b, n, d] -> [b, n, k, d/k] for each s of a kernel [d, s, k, d/k], in one matrix product."""
  y = kernels.dot_general(x, kernel, (((2,), (0,)), ((), ())))               # b n s k d
  parts = jax.lax.split(y + offsets[None, None], (1,) * len(offsets), 2)
  return [part[:, :, 0] for part in parts]


def attention_weights(query, key, bias=None, mask=None):
  """softmax(q k^T / sqrt(d)) (1706.03762 eq. 1) in float32, [b, k, q, n], of ATTENTION's input."""
  logits = jnp.einsum("bqkd,bnkd->bkqn", query, key, preferred_element_type=jnp.float32)
  logits = logits * query.shape[-1]**-0.5
  logits = logits if bias is None else logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  return nn.softmax(logits)


class Attention(nn.Module):
  """Multi-head attention (1706.03762 sec. 3.2), one fused query-key-value kernel [d, 3, k, d/k].

  Self-attention when `memory` is None. Softmax in float32.
  """

  heads: int  # divides the width
  qk_norm: bool = False  # 2302.05442 eq. 1: norm of queries and keys over a head's features
  fused_init: bool = False  # Xavier fans of the fused [d, 3d] matrix (MAE), else of three [d, d]
  attention: str = "auto"  # a key of ATTENTION
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32
  kernel_init: str = "xavier"  # a key of layers.KERNEL_INITS

  @nn.nowrap
  def qkv_params(self, width: int):
    """The fused kernel [d, 3, k, d/k] and its offsets [3, k, d/k], in the compute type."""
    init, shape = KERNEL_INITS[self.kernel_init], (3, self.heads, width // self.heads)
    if init is None or self.kernel_init == "torch":
      fused = self.fused_init or self.kernel_init == "torch"
      fan = dict(in_axis=0, out_axis=(1, 2, 3)) if fused else dict(
        in_axis=0, out_axis=(2, 3), batch_axis=(1,))
      init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", **fan)
    return (self.param("qkv_kernel", init, (width, *shape)).astype(self.dtype),
            self.param("qkv_bias", nn.initializers.zeros, shape).astype(self.dtype))

  @nn.compact
  def __call__(self, x, memory=None, mask=None, *, rotate=None, bias=None, cache=None, index=0,
               return_weights: bool = False):
    """x [b, q, d] -> [b, q, d], and with `return_weights` the attention weights [b, k, q, n].

    Args:
      x: tokens; None gives the (key, value) of `memory` alone.
      memory: tokens [b, n, d] to attend to, or their (key, value), each [b, n, k, d/k].
      mask: broadcastable to [b, k, q, n], True = attend.
      rotate: rotary positions, applied to queries [b, q, k, d/k] and keys [b, n, k, d/k].
      bias: of the logits, broadcastable to [b, k, q, n], or a function that makes it of the
        queries before they are rotated and the keys after.
      cache: (key, value), each [b, n, k, d/k], of which x has the tokens from `index` on: they
        are written there, and what is returned is ([b, q, d], the cache).
    """
    width = (memory if x is None else x).shape[-1]
    kernel, offsets = self.qkv_params(width)

    def norm(name, x):
      if not self.qk_norm:
        return x
      return NORMS[self.norm](epsilon=self.norm_eps, dtype=self.dtype, name=name)(x)

    if memory is None:
      query, key, value = project(x, kernel, offsets)
      key = norm("key_norm", key)
    elif isinstance(memory, tuple):
      query, (key, value) = project(x, kernel[:, :1], offsets[:1])[0], memory
    else:
      key, value = project(memory, kernel[:, 1:], offsets[1:])
      key = norm("key_norm", key)
      if x is None:
        return key, value
      query = project(x, kernel[:, :1], offsets[:1])[0]                      # b q k d
    plain = query = norm("query_norm", query)
    if rotate is not None:
      query, key = rotate(query), rotate(key)
    if cache is not None:
      key, value = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype),
                                                                     index, 1)
                                 for old, new in zip(cache, (key, value)))
    bias = bias(plain, key) if callable(bias) else bias
    mixed = ATTENTION[self.attention](query, key, value, bias=bias, mask=mask)
    init = KERNEL_INITS[self.kernel_init] or nn.initializers.xavier_uniform()
    out = Dense(width, (-2, -1), dtype=self.dtype, kernel_init=init, name="out")(mixed)  # b q d
    if cache is not None:
      return out, cache
    return (out, attention_weights(query, key, bias, mask)) if return_weights else out
