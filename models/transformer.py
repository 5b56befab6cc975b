"""The Transformer encoder stack that every method here is built on.

Each choice (norm, activation, attention, rematerialisation) is a row in a small table. The blocks'
parameters are stacked on a leading layer axis whether the stack is scanned or unrolled, so that
checkpoints, sharding rules and weight converters know one layout.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models import kernels


class LayerNorm(nn.Module):
  """`layer_norm` with learned scale and bias; statistics in float32."""

  epsilon: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return kernels.layer_norm(x.astype(self.dtype), scale, bias, self.epsilon)


NORMS: Mapping[str, Callable[..., nn.Module]] = {
  "layernorm": LayerNorm,
  "rmsnorm": functools.partial(nn.RMSNorm, use_fast_variance=False),
}

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": kernels.gelu,
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "silu": nn.silu,
}

ATTENTION: Mapping[str, Callable[..., jax.Array]] = {
  # (query [b, q, k, d], key [b, n, k, d], value [b, n, k, d], mask=...) -> [b, q, k, d]
  "auto": kernels.attention,
  "xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
  "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
}

REMAT: Mapping[str, Callable | None] = {
  # What a block keeps for its backward pass; the rest is computed again.
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def split_by_example(x):
  """Keeps activations split by example over a mesh, if one is set: [b, ...] -> the same.

  Without it a compiler that sees parameters split over devices may split features instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


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

  @nn.compact
  def __call__(self, x, memory=None, mask=None, *, rotate=None, return_weights: bool = False):
    """x [b, q, d], memory [b, n, d], mask broadcastable to [b, k, q, n], True = attend.

    `rotate` (rotary positions) is applied to queries [b, q, k, d] and keys [b, n, k, d].
    Returns [b, q, d], and with `return_weights` the attention weights [b, k, q, n] too.
    """
    width, head_dim = x.shape[-1], x.shape[-1] // self.heads
    fan = dict(in_axis=0, out_axis=(1, 2, 3)) if self.fused_init else dict(
      in_axis=0, out_axis=(2, 3), batch_axis=(1,))
    kernel = self.param("qkv_kernel", nn.initializers.variance_scaling(
      1.0, "fan_avg", "uniform", **fan), (width, 3, self.heads, head_dim)).astype(self.dtype)
    bias = self.param("qkv_bias", nn.initializers.zeros, (3, self.heads, head_dim))
    bias = bias.astype(self.dtype)

    def project(x, kernel, bias):  # one matrix product however many of q, k, v are asked for
      y = x.reshape(-1, width) @ kernel.reshape(width, -1) + bias.reshape(1, -1)
      return y.reshape(*x.shape[:2], *bias.shape)              # b n s k d

    if memory is None:
      query, key, value = jnp.moveaxis(project(x, kernel, bias), 2, 0)
    else:
      query = project(x, kernel[:, :1], bias[:1])[:, :, 0]     # b q k d
      key, value = jnp.moveaxis(project(memory, kernel[:, 1:], bias[1:]), 2, 0)
    if self.qk_norm:
      norm = functools.partial(NORMS[self.norm], epsilon=self.norm_eps, dtype=self.dtype)
      query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
    if rotate is not None:
      query, key = rotate(query), rotate(key)
    mixed = ATTENTION[self.attention](query, key, value, mask=mask)
    out = nn.DenseGeneral(width, axis=(-2, -1), name="out", dtype=self.dtype,
                          kernel_init=nn.initializers.xavier_uniform())(mixed)  # b q d
    if not return_weights:
      return out
    logits = jnp.einsum("bqkd,bnkd->bkqn", query, key, preferred_element_type=jnp.float32)
    logits = logits * head_dim**-0.5
    if mask is not None:
      logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return out, nn.softmax(logits)


class Mlp(nn.Module):
  """Two dense layers with an activation between them."""

  hidden: int  # features
  activation: str = "gelu"  # a key of ACTIVATIONS
  dropout: float = 0.0  # rate, [0, 1)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    dense = functools.partial(nn.Dense, dtype=self.dtype,
                              kernel_init=nn.initializers.xavier_uniform())
    h = ACTIVATIONS[self.activation](dense(self.hidden, name="up")(x))      # ... hidden
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return dense(x.shape[-1], name="down")(h)


class Block(nn.Module):
  """Pre-norm Transformer block (2010.11929 eq. 2 and 3), with layer scale and drop path."""

  heads: int
  mlp_dim: int
  activation: str = "gelu"
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  attention: str = "auto"
  qk_norm: bool = False
  fused_init: bool = False
  layer_scale: float = 0.0  # initial value of 2103.17239's scale; 0 = none
  dropout: float = 0.0  # rate, [0, 1)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, drop_path=0.0, mask=None, *, train: bool = False,
               return_weights: bool = False):
    """x [b, n, d]; `drop_path` is the rate (1603.09382) at which an example skips a branch."""
    norm = functools.partial(NORMS[self.norm], epsilon=self.norm_eps, dtype=self.dtype)

    def add(x, branch, name):
      if self.layer_scale:
        gamma = self.param(f"{name}_scale", nn.initializers.constant(self.layer_scale),
                           (x.shape[-1],))
        branch = branch * gamma.astype(branch.dtype).reshape(1, 1, -1)
      branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
      if train and self.has_rng("drop_path"):
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, (x.shape[0], 1, 1))
        branch = jnp.where(keep, branch / (1 - drop_path).astype(branch.dtype), 0)
      return x + branch

    attention = Attention(self.heads, self.qk_norm, self.fused_init, self.attention, self.norm,
                          self.norm_eps, self.dtype, name="attention")
    y = attention(norm(name="attention_norm")(x), mask=mask, return_weights=return_weights)
    y, weights = y if return_weights else (y, None)
    x = add(x, y, "attention")                                               # b n d
    y = norm(name="mlp_norm")(x)
    y = Mlp(self.mlp_dim, self.activation, self.dropout, self.dtype, name="mlp")(y, train=train)
    x = add(x, y, "mlp")                                                     # b n d
    return (x, weights) if return_weights else x


class Transformer(nn.Module):
  """A stack of `depth` blocks and, unless `final_norm` is False, a norm after it.

  `scan=True` compiles one block and loops over it (compile time and memory of one layer, and the
  parameters of one layer at a time gathered under FSDP); False unrolls (faster steps).
  """

  depth: int
  heads: int
  mlp_dim: int
  activation: str = "gelu"
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  attention: str = "auto"
  qk_norm: bool = False
  fused_init: bool = False
  layer_scale: float = 0.0
  dropout: float = 0.0  # rate, [0, 1)
  drop_path: float = 0.0  # rate at the last block; grows linearly from 0 at the first
  final_norm: bool = True
  scan: bool = False
  remat: str = "none"  # a key of REMAT
  dtype: jnp.dtype = jnp.float32
  redraw: Callable | None = None  # (rng, the blocks' initial parameters) -> others in their place

  @nn.compact
  def __call__(self, x, mask=None, *, train: bool = False, return_weights: bool | str = False):
    """x [b, n, d] -> [b, n, d]; with `return_weights` also attention weights.

    True: the last block's, [b, k, n, n]. "all": every block's, [b, depth, k, n, n].
    """
    block = Block(self.heads, self.mlp_dim, self.activation, self.norm, self.norm_eps,
                  self.attention, self.qk_norm, self.fused_init, self.layer_scale, self.dropout,
                  self.dtype, parent=None)

    def init(rng):
      example = jnp.zeros((1, *x.shape[1:]), self.dtype)
      blocks = jax.vmap(lambda key: block.init(key, example)["params"])(
        jax.random.split(rng, self.depth))
      return self.redraw(rng, blocks) if self.redraw else blocks

    params = self.param("blocks", init)                                      # leaves: depth ...
    rates = jnp.linspace(0.0, self.drop_path, self.depth)
    streams = [name for name, rate in [("dropout", self.dropout), ("drop_path", self.drop_path)]
               if train and rate]
    keys = {name: jax.random.split(self.make_rng(name), self.depth) for name in streams}

    every, last = return_weights == "all", return_weights is True

    def apply(x, layer, return_weights=every):
      params, rate, rngs = layer
      out = block.apply({"params": params}, split_by_example(x), rate, mask, train=train,
                        rngs=rngs, return_weights=return_weights)
      return out if return_weights else (out, None)

    step = apply
    if self.remat != "none":
      step = jax.checkpoint(apply, policy=REMAT[self.remat])
    layers, looped = (params, rates, keys), self.depth - last
    if self.scan:
      x, weights = jax.lax.scan(step, x, jax.tree.map(lambda a: a[:looped], layers))
    else:
      each = []
      for i in range(looped):
        x, of_block = step(x, jax.tree.map(lambda a, i=i: a[i], layers))
        each.append(of_block)
      weights = jnp.stack(each) if every else None
    if every:
      weights = jnp.moveaxis(weights, 0, 1)                                  # b depth k n n
    if last:  # the last block apart: only its weights are wanted
      x, weights = apply(x, jax.tree.map(lambda a: a[-1], layers), return_weights=True)
    x = split_by_example(x)
    if self.final_norm:
      x = NORMS[self.norm](epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
    return (x, weights) if return_weights else x
