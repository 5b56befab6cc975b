"""Masked autoencoder (2111.06377): a ViT over visible patches, a small decoder over all of them."""

from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import layers, vit
from models.positions import KINDS
from models.positions import check as check_positions
from models.transformer import Style, Transformer, check_heads, choices

IMAGE_NETWORK = "encoder"  # the part that other runs start from


# --- Masking: noise whose order says which patches go. The lowest stay (2111.06377 sec. 3) --------

def random_noise(rng, batch_size: int, grid: tuple[int, int]):
  """Uniform noise [b, n]: every patch equally likely to stay."""
  return jax.random.uniform(rng, (batch_size, grid[0] * grid[1]))


def grid_noise(rng, batch_size: int, grid: tuple[int, int]):
  """Keeps one patch of every 2x2 before any other (2111.06377 fig. 6, right): [b, n]."""
  corner = (jnp.arange(grid[0])[:, None] % 2 + jnp.arange(grid[1])[None, :] % 2) == 0  # h w
  return random_noise(rng, batch_size, grid) + jnp.where(corner.reshape(1, -1), 0.0, 1.0)


def block_noise(rng, batch_size: int, grid: tuple[int, int], blocks: int = 32):
  """Removes rectangles first (2106.08254 sec. 2.3; 2111.06377 fig. 6, middle): [b, n].

  Rectangles of 1/16 to 1/4 of the image and aspect ratio 0.3 to 1/0.3 fall one after another; a
  patch goes the earlier, the earlier it is covered. So the number removed is exact.
  """
  size_key, ratio_key, place_key, tie_key = jax.random.split(rng, 4)
  shape, sides = (batch_size, blocks), jnp.asarray(grid, jnp.float32)
  area = jax.random.uniform(size_key, shape, minval=1 / 16, maxval=1 / 4) * sides.prod()
  ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=jnp.log(0.3), maxval=-jnp.log(0.3)))
  extent = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], -1)   # b blocks 2
  extent = jnp.clip(extent, 1.0, sides.reshape(1, 1, 2))
  low = jax.random.uniform(place_key, (*shape, 2)) * (sides.reshape(1, 1, 2) - extent + 1)
  low, high = jnp.floor(low), jnp.floor(low) + jnp.round(extent)

  def inside(axis):                                                          # b blocks side
    at = jnp.arange(grid[axis]).reshape(1, 1, -1)
    return (at >= low[..., axis, None]) & (at < high[..., axis, None])

  covered = inside(0)[..., :, None] & inside(1)[..., None, :]                # b blocks h w
  covered = covered.reshape(*shape, -1)
  first = jnp.where(covered.any(1), covered.argmax(1), blocks)               # b n
  return random_noise(tie_key, batch_size, grid) + (blocks - first)


MASKING: Mapping[str, Callable] = {
  "random": random_noise, "grid": grid_noise, "block": block_noise}


def mask_from_noise(noise, mask_ratio: float):
  """Noise [b, n] -> (ids_keep [b, m], ids_restore [b, n], mask [b, n] with 1 = removed, 0 = kept).

  m = int(n * (1 - mask_ratio)): the patches with the lowest noise, in the order of their noise.
  """
  b, n = noise.shape
  kept = int(n * (1 - mask_ratio))
  shuffle = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(shuffle, axis=1)
  return shuffle[:, :kept], restore, (restore >= kept).astype(jnp.float32)


def mask_from_keep(keep, patches: int):
  """What `mask_from_noise` gives, by the patches that stay: int [b, m], each once."""
  rows = jnp.arange(len(keep))[:, None]
  mask = jnp.ones((len(keep), patches)).at[rows, keep].set(0)                # b n
  shuffle = jnp.argsort(mask, axis=1)
  return shuffle[:, :keep.shape[1]], jnp.argsort(shuffle, axis=1), mask


# --- The network ----------------------------------------------------------------------------------

class Decoder(nn.Module):
  """Visible tokens and mask tokens, in image order, to pixels (2111.06377 sec. 3)."""

  grid: tuple[int, int]  # patches
  outputs: int  # pixels of a patch times channels
  width: int
  depth: int
  heads: int
  mlp_dim: int
  prefix: int  # tokens before the patches
  resample: str
  stack: Mapping  # what the Transformer shares with the encoder's: a Style

  @nn.compact
  def __call__(self, tokens, restore, grid, *, train: bool = False):
    """tokens [b, prefix + m, d], ids_restore [b, n] -> pred [b, n, outputs]."""
    dtype, positions = self.stack["dtype"], self.stack["positions"]
    dense = dict(kernel_init=nn.initializers.xavier_uniform(), dtype=dtype)
    x = layers.Dense(self.width, name="embed", **dense)(tokens)                  # b prefix+m d
    (b, _, d), n = x.shape, restore.shape[1]
    mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, d)).astype(dtype)
    prefix, visible = x[:, :self.prefix], x[:, self.prefix:]
    filler = jnp.broadcast_to(mask_token, (b, n - visible.shape[1], d))
    x = jnp.concatenate([visible, filler], axis=1)                           # b n d, shuffled
    x = jnp.take_along_axis(x, restore[:, :, None], axis=1)                  # b n d, image order
    table = vit.Positions(positions, self.grid, d, self.resample, name="position")(grid)
    stream = jnp.float32 if self.stack["float32_stream"] else dtype
    x, prefix = x.astype(stream), prefix.astype(stream)
    if table is not None:
      x = x + table[None].astype(stream)
    if positions == "learned" and self.prefix:
      prefix = prefix + self.param("prefix_position", nn.initializers.normal(0.02),
                                   (1, self.prefix, d)).astype(stream)
    x = jnp.concatenate([prefix, x], axis=1)                                 # b prefix+n d
    x = Transformer(self.depth, self.heads, self.mlp_dim, grid=self.grid, name="transformer",
                    **self.stack)(x, grid=grid, train=train)
    return layers.Dense(self.outputs, name="prediction", **dense)(x[:, self.prefix:])


class MAE(nn.Module):
  """Encoder and decoder; which patches are visible is the caller's choice."""

  encoder: vit.ViT
  decoder: Decoder

  def __call__(self, image, keep, restore, *, train: bool = False):
    """image [b, h, w, c], ids_keep [b, m], ids_restore [b, n] -> pred [b, n, p*p*c]."""
    patch = self.encoder.patch
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    tokens = self.encoder.encode(vit.patchify(image, patch), grid, keep, train=train)
    return self.decoder(tokens, restore, grid, train=train)

  def encode(self, image, *, return_weights: bool | str = False):
    """The encoder alone on whole images: as `ViT.__call__`."""
    return self.encoder(image, return_weights=return_weights)


def make(*, decoder_width: int = 512, decoder_depth: int = 8, decoder_heads: int = 16,
         decoder_mlp_dim: int | None = None, variant: str = "", image_size, channels: int,
         dtype: Literal[*vit.DTYPES] = "float32", pool: Literal["mean", "cls"] = "mean",
         positions: Literal[*KINDS] = "sincos2d", class_token: bool = True,
         fused_init: bool = True, patch_stem: Literal["patches"] = "patches",
         pool_before_norm: Literal[False] = False, **fields: vit.ViT) -> MAE:
  """A ViT encoder (`vit.make`'s fields) and a decoder; the defaults are the paper's.

  Args:
    decoder_width: features of a token of the decoder.
    decoder_depth: its blocks.
    decoder_heads: of its attention; they divide its width.
    decoder_mlp_dim: features inside its MLPs; None: four times its width.
    variant: of the encoder: a size of `vit.SIZES` and the patch in pixels, such as "B/16".
    image_size, channels, dtype: of the data, and of computation.
    pool: which tokens the features are made of after training: the patches' mean, or the class's.
    positions: of encoder and decoder.
    class_token: whether there is one.
    fused_init: query, key, value start as one matrix, else as three.
    patch_stem: patches are what is removed.
    pool_before_norm: of fine-tuning, not of this.

  Raises ValueError as `vit.make`, and where decoder_heads does not divide decoder_width.
  """
  if patch_stem != "patches":
    raise ValueError(f"model.patch_stem = {patch_stem!r}: an MAE removes patches, so it takes "
                     "'patches' alone")
  if pool_before_norm:
    raise ValueError("model.pool_before_norm = True: a decoder reads this network's tokens")
  encoder = vit.make(variant=variant, image_size=image_size, channels=channels, dtype=dtype,
                     positions=positions, pool=pool, class_token=class_token,
                     fused_init=fused_init, **fields)
  check_heads(decoder_width, decoder_heads, "decoder_")
  check_positions(positions, decoder_width // decoder_heads, axes=2,
                  field="positions = 'rope' (decoder)")
  # Noise and scales that an encoder learns better by are not the decoder's.
  stack = {**choices(encoder, Style), "layer_scale": 0.0, "dropout": 0.0, "drop_path": 0.0}
  decoder = Decoder(encoder.grid, encoder.patch**2 * encoder.channels, decoder_width,
                    decoder_depth, decoder_heads, decoder_mlp_dim or 4 * decoder_width,
                    encoder.prefix, encoder.resample, stack)
  return MAE(encoder, decoder)
