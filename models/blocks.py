"""A block of a Transformer: self-attention, attention to a memory, MLP, and where its norms are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import ATTENTION, Attention
from models.layers import ACTIVATIONS, KERNEL_INITS, NORMS, Mlp


class Placement(NamedTuple):
  """Where a block's norms are, of each residual branch x + f(x)."""

  before: bool = False  # of what the branch reads
  branch: bool = False  # of what the branch gives
  after: bool = False  # of the sum; then none is left for the end of the stack


PLACEMENTS: Mapping[str, Placement] = {
  "pre": Placement(before=True),  # 2002.04745
  "post": Placement(after=True),  # 1706.03762 sec. 3.1
  "sandwich": Placement(before=True, branch=True),  # 2105.13290 sec. 2.4
  "deepnorm": Placement(after=True),  # 2203.00555 sec. 4, and models/deepnorm.py
}


class BlockStyle(nn.Module, kw_only=True):
  """The choices that a block is made by: fields of all that is made of blocks."""

  activation: Literal[*ACTIVATIONS] = "gelu"  # of the MLPs; the last five are gated
  norm: Literal[*NORMS] = "layernorm"  # of the blocks and at the end
  norm_eps: float = 1e-6  # added to the variance
  placement: Literal[*PLACEMENTS] = "pre"  # of norms
  attention: Literal[*ATTENTION] = "auto"  # what computes it; auto: cuDNN where it can
  qk_norm: bool = False  # norms of queries and keys (2302.05442)
  fused_init: bool = False  # query, key, value start as one matrix (MAE), else as three
  kernel_init: Literal[*KERNEL_INITS] = "xavier"  # of attention and MLPs
  layer_scale: float = 0.0  # initial value of 2103.17239's scale; 0 = none
  dropout: float = 0.0  # rate, [0, 1)
  float32_stream: bool = True  # what blocks add to stays float32, whatever they compute in
  dtype: jnp.dtype = jnp.float32

  @property
  def stream(self):
    """The type of what blocks read and add to.

    bfloat16 has 8 bits: a branch below 1/512 of what it is added to (layer scale's 1e-4) would be
    lost altogether. Under PyTorch's autocast the sum is float32 too.
    """
    return jnp.float32 if self.float32_stream else self.dtype

  @nn.nowrap
  def make_norm(self, name: str | None = None, dtype=None):
    return NORMS[self.norm](epsilon=self.norm_eps, dtype=dtype or self.dtype, name=name)

  @nn.nowrap
  def make_attention(self, heads: int, **kwargs):
    return Attention(heads, self.qk_norm, self.fused_init, self.attention, self.norm, self.norm_eps,
                     self.dtype, self.kernel_init, **kwargs)


def choices(module, of: type) -> dict:
  """What `module` says of the fields of `of`, BlockStyle or Style."""
  return {f.name: getattr(module, f.name) for f in dataclasses.fields(of)
          if f.name not in ("parent", "name")}


class Context(NamedTuple):
  """What all blocks of a stack are told: arguments of `Attention`."""

  mask: Any = None
  rotate: Callable | None = None
  bias: Any = None
  memory: Any = None
  memory_mask: Any = None
  index: Any = 0


ALONE = Context()


class Block(BlockStyle):
  """Transformer block (2010.11929 eq. 2 and 3), with layer scale and drop path."""

  heads: int
  mlp_dim: int
  cross: bool = False  # attention to a memory between self-attention and MLP
  alpha: float = 1.0  # of DeepNorm

  @nn.compact
  def __call__(self, x, drop_path=0.0, context: Context = ALONE, cache=None, *,
               train: bool = False, return_weights: bool = False):
    """x [b, n, d]; `drop_path` is the rate (1603.09382) at which an example skips a branch.

    Returns also attention weights if asked for (with `cross` those to the memory), or, where there
    is a cache (a layer of `Transformer.init_cache`'s), the cache with x in it.
    """
    placement = PLACEMENTS[self.placement]

    def read(x, name):
      return (self.make_norm(f"{name}_norm")(x) if placement.before else x).astype(self.dtype)

    def add(x, branch, name):
      if placement.branch:
        branch = self.make_norm(f"{name}_out_norm")(branch)
      branch = branch.astype(self.stream)
      if self.layer_scale:
        gamma = self.param(f"{name}_scale", nn.initializers.constant(self.layer_scale),
                           (x.shape[-1],))
        branch = branch * gamma.astype(branch.dtype).reshape(1, 1, -1)
      branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
      if train and self.has_rng("drop_path"):
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, (x.shape[0], 1, 1))
        branch = jnp.where(keep, branch / (1 - drop_path).astype(branch.dtype), 0)
      x = (x if self.alpha == 1 else self.alpha * x) + branch
      return self.make_norm(f"{name}_norm", self.stream)(x) if placement.after else x

    own = None if cache is None else (cache["key"], cache["value"])
    y = self.make_attention(self.heads, name="attention")(
      read(x, "attention"), mask=context.mask, rotate=context.rotate, bias=context.bias, cache=own,
      index=context.index, return_weights=return_weights and not self.cross)
    y, more = y if isinstance(y, tuple) else (y, None)
    x = add(x, y, "attention")                                               # b n d
    if self.cross:
      memory = context.memory if cache is None else (cache["memory_key"], cache["memory_value"])
      y = self.make_attention(self.heads, name="cross_attention")(
        read(x, "cross_attention"), memory, context.memory_mask, return_weights=return_weights)
      y, more = y if return_weights else (y, more)
      x = add(x, y, "cross_attention")                                       # b n d
    y = Mlp(self.mlp_dim, self.activation, self.dropout, self.dtype, self.kernel_init, name="mlp")(
      read(x, "mlp"), train=train)
    x = add(x, y, "mlp")                                                     # b n d
    if cache is not None:
      return x, {**cache, "key": more[0], "value": more[1]}
    return (x, more) if return_weights else x
