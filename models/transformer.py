"""The Transformer that every method here is built on: an encoder, or a decoder with a cache.

Each choice is a row in a small table, here or in models/'s blocks, layers, attention, relative.
The blocks' parameters are stacked on a leading layer axis whether the stack is scanned or unrolled,
so that checkpoints, sharding rules and weight converters know one layout.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models import kernels, positions
from models.blocks import PLACEMENTS, Block, BlockStyle, Context, choices
from models.positions import KINDS, RELATIVE

REMAT: Mapping[str, Callable | None] = {
  # What a block keeps for its backward pass; the rest is computed again.
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


SPREADS: Mapping[str, Callable] = {
  # (rate, depth) -> the rate of each block's drop path, [depth]
  "linear": lambda rate, depth: jnp.linspace(0.0, rate, depth),  # 1603.09382 eq. 4, from 0
  "uniform": lambda rate, depth: jnp.full(depth, rate, jnp.float32),  # 2204.07118's code
}


# --- A stack of any blocks ------------------------------------------------------------------------

def split_by_example(x):
  """Keeps activations split by example over a mesh, if one is set: [b, ...] -> the same.

  Without it a compiler that sees parameters split over devices may split features instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def init_blocks(rng, block: nn.Module, depth: int, *example):
  """Initial parameters of `depth` blocks, with a leading layer axis."""
  return jax.vmap(lambda key: block.init(key, *example)["params"])(jax.random.split(rng, depth))


def run_blocks(step, x, layers, *, scan: bool, remat: str):
  """x, y = step(x, layer) for each of `layers`' leading axis: (x, every y, stacked).

  `scan` compiles one block and loops over it (compile time and memory of one layer, and the
  parameters of one layer at a time gathered under FSDP), else unrolls (faster steps).
  """
  if remat != "none":
    step = jax.checkpoint(step, policy=REMAT[remat])
  if scan:
    return jax.lax.scan(step, x, layers)
  each, step = [], jax.jit(step)  # traced once
  for layer in kernels.unstack(layers):
    x, y = step(x, layer)
    each.append(y)
  return x, jax.tree.map(lambda *y: jnp.stack(y), *each) if each else None


# --- Transformer ----------------------------------------------------------------------------------

class Style(BlockStyle, kw_only=True):
  """The choices that a stack of blocks is made by."""

  drop_path: float = 0.0  # rate at the last block
  drop_path_spread: Literal[*SPREADS] = "linear"  # what the blocks before it have
  positions: Literal[*KINDS] = "none"  # the absolute are added before the stack
  rope_base: float | None = None  # wavelengths, as in `relative.rope`; None: its own
  rope_scale: float = 1.0  # factor on places, as in `relative.rope`
  window: int = 0  # places that a token sees to each side, its own included; 0: all
  scan: bool = False  # one block compiled and looped over, else all unrolled
  remat: Literal[*REMAT] = "none"  # what is computed again for the gradient, to save memory


def check_heads(width: int, heads: int, prefix: str = ""):
  """Raises ValueError where a width cannot be split into heads."""
  if heads < 1:
    raise ValueError(f"model.{prefix}heads = {heads}: expected at least 1")
  if width % heads:
    raise ValueError(f"model.{prefix}heads = {heads} does not divide model.{prefix}width = {width}")


def check(network, *, axes: int, prefix: str = ""):
  """Raises ValueError where a number of a Style with width, depth and heads is out of range.

  `axes` are those of places, 1 of a text and 2 of a grid; `prefix` is what its fields begin with in
  a config's model.
  """
  check_heads(network.width, network.heads, prefix)
  positions.check(network.positions, network.width // network.heads, axes,
                  f"{prefix}positions = 'rope'")
  rope = network.positions == "rope"
  for name, ok, expected in (
      ("depth", network.depth >= 1, "at least 1"), ("window", network.window >= 0, "at least 0"),
      ("dropout", 0 <= network.dropout < 1, "a number in [0, 1)"),
      ("drop_path", 0 <= network.drop_path < 1, "a number in [0, 1)"),
      ("rope_base", network.rope_base is None or network.rope_base > 0, "a number above 0"),
      ("rope_scale", network.rope_scale > 0, "a number above 0"),
      ("rope_base", rope or network.rope_base is None, "none without positions = 'rope'"),
      ("rope_scale", rope or network.rope_scale == 1, "1 without positions = 'rope'"),
      ("qk_norm", not network.qk_norm or network.norm != "none", "false where norm = 'none'")):
    if not ok:
      raise ValueError(f"model.{prefix}{name} = {getattr(network, name)}: expected {expected}")


class Transformer(Style):
  """A stack of `depth` blocks and a norm after it.

  There is none where `final_norm` is False, or the placement has each block end with one.
  """

  depth: int
  heads: int
  mlp_dim: int
  causal: bool = False  # a token sees those before it alone
  cross: bool = False  # blocks attend to a memory too
  grid: tuple[int, ...] = ()  # (length,) or (h, w): what learned relative positions are made for
  trained: int = 0  # tokens; causal rope goes beyond by `relative.dual_chunk`; 0: as it is
  decoder_depth: int = 0  # of a decoder that reads this stack: for DeepNorm
  final_norm: bool = True
  redraw: Callable | None = None  # (rng, the blocks' initial parameters) -> others in their place

  @nn.nowrap
  def stack(self, shape):
    """(a block, the parameters of all of them, leaves [depth, ...]) for tokens of shape (n, d)."""
    alpha = beta = 1.0
    if self.placement == "deepnorm":
      from models import deepnorm  # loaded where it is used
      alpha, beta = deepnorm.deepnorm(self.depth, self.cross, self.decoder_depth)
    block = Block(self.heads, self.mlp_dim, self.cross, alpha, **choices(self, BlockStyle),
                  parent=None)

    def init(rng):
      example = jnp.zeros((1, *shape), self.stream)
      context = Context(memory=example if self.cross else None)
      blocks = init_blocks(rng, block, self.depth, example, 0.0, context)
      blocks = self.redraw(rng, blocks) if self.redraw else blocks
      return blocks if beta == 1 else deepnorm.scaled(blocks, beta)

    return block, self.param("blocks", init)

  @nn.compact
  def __call__(self, x, mask=None, *, memory=None, memory_mask=None, grid=None, keep=None,
               cache=None, index=0, train: bool = False, return_weights: bool | str = False):
    """x [b, n, d] -> [b, n, d]; with `return_weights` also attention weights.

    True: the last block's, [b, k, n, n]. "all": every block's, [b, depth, k, n, n]. With `cross`
    they are those to the memory.

    Args:
      x: tokens, embedded.
      mask: bool, broadcastable to [b, k, n, n], True = attend; beside `causal` and `window`.
      memory: tokens [b, m, e] to attend to, for `cross`; projected to d where e is another.
      memory_mask: bool, broadcastable to [b, k, n, m].
      grid: (h, w) of the last tokens of x, patches; those before have no place. None: a text.
      keep: int [b, m], which patches of the grid x has; None: all.
      cache: `init_cache`'s, with all that stands before x; then (x, the cache with x) is returned.
      index: place of x's first token in the text, with a cache.
    """
    if self.cross and memory is None and cache is None:
      raise ValueError("a Transformer with cross = True needs a memory, or a cache that has it")
    if memory is not None and memory.shape[-1] != x.shape[-1]:
      memory = nn.Dense(x.shape[-1], dtype=self.dtype, name="memory")(memory)  # b m d

    block, params = self.stack(x.shape[1:])
    x = x.astype(self.stream)
    rates = SPREADS[self.drop_path_spread](self.drop_path, self.depth)
    streams = [name for name, rate in [("dropout", self.dropout), ("drop_path", self.drop_path)]
               if train and rate]
    keys = {name: jax.random.split(self.make_rng(name), self.depth) for name in streams}
    length = x.shape[1] if cache is None else cache["key"].shape[2]
    seen = rotate = bias = None
    if self.causal or self.window or self.positions in RELATIVE:
      from models import relative  # loaded where attention is told of places
      seen, rotate, bias = relative.told(self, x, grid, keep, length, index)
    written = None if cache is None else (jnp.arange(length) < index + x.shape[1])[None, None, None]
    mask = nn.combine_masks(mask, seen, written, dtype=bool)
    context = Context(mask, rotate, bias, memory, memory_mask, index)

    every, last = return_weights == "all", return_weights is True

    def apply(x, layer, return_weights=every):
      params, rate, rngs, cache = layer
      out = block.apply({"params": params}, split_by_example(x), rate, context, cache, train=train,
                        rngs=rngs, return_weights=return_weights)
      return out if return_weights or cache is not None else (out, None)

    layers = (params, rates, keys, cache)
    looped = jax.tree.map(lambda a: a[:self.depth - last], layers) if last else layers
    x, more = run_blocks(apply, x, looped, scan=self.scan, remat=self.remat)
    if every:
      more = jnp.moveaxis(more, 0, 1)                                        # b depth k n n
    if last:  # the last block apart: only its weights are wanted
      x, more = apply(x, jax.tree.map(lambda a: a[-1], layers), return_weights=True)
    x = split_by_example(x)
    if self.final_norm and not PLACEMENTS[self.placement].after:
      x = self.make_norm("norm")(x)
    x = x.astype(self.dtype)
    return x if more is None else (x, more)

  def init_cache(self, batch: int, length: int, memory=None):
    """Room for the keys and values of `length` tokens, and those of `memory` [b, m, e].

    {"key", "value": [depth, b, length, k, d/k], "memory_key", "memory_value": [depth, b, m, k,
    d/k]}, for `__call__`. A method of the bound module: it needs the parameters.
    """
    params = self.variables["params"]
    blocks = params["blocks"]
    shape = blocks["attention"]["qkv_bias"].shape                            # depth 3 k d/k
    room = jnp.zeros((self.depth, batch, length, *shape[2:]), self.dtype)
    cache = {"key": room, "value": room}
    if self.cross:
      if "memory" in params:
        memory = nn.Dense(math.prod(shape[2:]), dtype=self.dtype, parent=None).apply(
          {"params": params["memory"]}, memory)
      attention = self.make_attention(self.heads, parent=None)
      cache["memory_key"], cache["memory_value"] = jax.vmap(
        lambda layer: attention.apply({"params": layer}, None, memory))(blocks["cross_attention"])
    return cache
