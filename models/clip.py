"""CLIP (2103.00020) and SigLIP (2303.15343): an image tower and a text tower into one space."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import backbones, text, vit


def _clip(image: str, width: int, heads: int) -> dict:
  return dict(variant=image, pre_norm=True, patch_bias=False, activation="quick_gelu",
              norm_eps=1e-5, embed_dim=width, text_width=width, text_depth=12, text_heads=heads)


VARIANTS = {
  "CLIP-B/32": _clip("B/32", 512, 8),  # 2103.00020 table 20
  "CLIP-B/16": _clip("B/16", 512, 8),
  "CLIP-L/14": _clip("L/14", 768, 12),
  "SigLIP-B/16": dict(  # 2303.15343 sec. 4; scale and bias: sec. 3.2
    variant="B/16", pool="map", activation="gelu_tanh", embed_dim=768, project_image=False,
    projection_bias=True, text_width=768, text_depth=12, text_heads=12, text_causal=False,
    text_pool="last", text_clip_init=False, init_scale=10.0, init_bias=-10.0)}


class CLIP(nn.Module):
  """Two towers, a linear projection of each, learned scale and bias of the logits."""

  image: nn.Module  # (image, *, train, return_weights) -> (pooled [b, d], out)
  text: text.TextTower
  embed_dim: int  # features of an embedding
  project_image: bool = True  # False: the image tower's features are the embedding
  projection_bias: bool = False  # of the towers' projections
  init_scale: float = 1 / 0.07  # exp(logit_scale) at the start (2103.00020 sec. 2.5)
  init_bias: float | None = None  # logit_bias at the start; None: there is none
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    def projection():
      return nn.Dense(self.embed_dim, self.projection_bias, dtype=self.dtype)
    if self.project_image:
      self.image_projection = projection()
    self.text_projection = projection()
    self.logit_scale = self.param(
      "logit_scale", nn.initializers.constant(math.log(self.init_scale)), ())
    self.logit_bias = None if self.init_bias is None else self.param(
      "logit_bias", nn.initializers.constant(self.init_bias), ())

  def encode_image(self, image, *, train: bool = False, return_weights: bool | str = False):
    """The image tower alone: as `ViT.__call__`."""
    return self.image(image, train=train, return_weights=return_weights)

  def embed_image(self, image, *, train: bool = False):
    """image [b, h, w, c] -> [b, embed_dim], unit norm, float32."""
    x, _ = self.image(image, train=train)
    if not self.project_image and x.shape[-1] != self.embed_dim:
      raise ValueError(f"model.embed_dim = {self.embed_dim}: with model.project_image = False it "
                       f"must be the {x.shape[-1]} features of the image tower")
    return unit(self.image_projection(x) if self.project_image else x)

  def embed_text(self, ids, *, train: bool = False):
    """ids int [b, l] -> [b, embed_dim], unit norm, float32."""
    return unit(self.text_projection(self.text(ids, train=train)[0]))

  def __call__(self, image, ids, *, train: bool = False, image_train: bool = True):
    """-> (image and text embeddings [b, embed_dim], logit_scale [], logit_bias [] or None).

    Without `image_train` the image tower runs as in evaluation whatever `train` says.
    """
    return (self.embed_image(image, train=train and image_train),
            self.embed_text(ids, train=train), self.logit_scale, self.logit_bias)


def unit(x):
  """x / |x| over the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


IMAGE_NETWORK = "image"  # the parts that other runs start from
TEXT_NETWORK = "text"


def make(*, variant: str | int = "", backbone: Literal[*backbones.BACKBONES] = "vit", image_size,
         channels: int, dtype: Literal[*vit.DTYPES] = "float32", vocab_size: int | None = None,
         context: int | None = None, eos_id: int | None = None, pad_id: int | None = None,
         **fields: (*backbones.NETWORKS, CLIP, dict(text_=text.TextTower))) -> CLIP:
  """Two towers by `variant`, one of VARIANTS or the image tower's own ("B/16"), and any field.

  Args:
    variant: one of VARIANTS, or one of the image tower, such as "B/16".
    backbone: of the image tower.
    image_size, channels, dtype: of the data, and of computation.
    vocab_size, context, eos_id, pad_id: the tokenizer's.

  Fields of `text.TextTower` begin with text_, see `text.build`; the others are those of CLIP and of
  `models/BACKBONE.py`. Raises ValueError as `backbones.make` and `text.build`, and on
  an unknown variant.
  """
  if variant not in VARIANTS and "-" in str(variant):
    raise ValueError(f"model.variant = {variant!r}: expected one of {', '.join(VARIANTS)}, or a "
                     "variant of the image tower such as 'B/16'")
  fields = {**VARIANTS.get(variant, {"variant": variant} if variant else {}), **fields}
  missing = [name for name in ("embed_dim", "text_width", "text_depth", "text_heads")
             if name not in fields]
  if missing:
    raise ValueError(f"model: give variant (such as {next(iter(VARIANTS))!r}) or all of "
                     + ", ".join(missing))
  own = {f.name: fields.pop(f.name) for f in dataclasses.fields(CLIP) if f.name in fields}
  tower = text.build(text.TextTower, fields, dtype=dtype, vocab_size=vocab_size, context=context,
                    eos_id=eos_id, pad_id=pad_id)
  image = backbones.make(backbone, image_size=image_size, channels=channels, dtype=dtype, **fields)
  return CLIP(image, tower, dtype=jnp.dtype(dtype), **own)
