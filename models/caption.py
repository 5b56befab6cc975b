"""Images to texts: an image network, and a Transformer decoder that looks at its tokens."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import backbones, text, vit
from models.transformer import Style, Transformer, choices


class TextDecoder(text.TextStyle):
  """The next token of a text, by the tokens before it and those of an image.

  A text is read one place late, with `pad_id` before its first token (as in T5, 1910.10683). The
  table of embeddings is that of the output too (1608.05859).
  """

  def setup(self):
    self.embed, self.table = self.make_embed(), self.make_positions()
    self.transformer = Transformer(self.depth, self.heads, self.mlp_dim, causal=True, cross=True,
                                   grid=(self.context,), trained=self.trained,
                                   **choices(self, Style))

  def embedded(self, before, index=0):
    """Tokens `before` [b, q] the places from `index` on -> what is read there, [b, q, d]."""
    x = self.embed(before)
    if self.table is None:
      return x
    table = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.table), index, x.shape[1])
    return x.astype(self.stream) + table[None].astype(self.stream)

  def logits(self, x):
    """x [b, l, d] -> float32 [b, l, v]."""
    return jnp.einsum("bld,vd->blv", x, self.embed.embedding.astype(self.dtype),
                      preferred_element_type=jnp.float32)

  def __call__(self, ids, memory, *, train: bool = False, return_weights: bool = False):
    """ids int [b, l], memory [b, n, e] -> float32 logits [b, l, v] of each token.

    With `return_weights` also what of the memory each is predicted by, in the last block:
    [b, k, l, n]. Raises ValueError on texts longer than the context.
    """
    self.check_length(ids.shape[1])
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=self.pad_id)
    x = self.transformer(self.embedded(before), memory=memory, train=train,
                         return_weights=return_weights)
    return (self.logits(x[0]), x[1]) if return_weights else self.logits(x)

  def begin(self, memory):
    """The cache of texts that have no token yet; its arrays have the batch on axis 1."""
    return self.transformer.init_cache(memory.shape[0], self.context, memory)

  def step(self, cache, token, index):
    """(cache, token [b] before place `index`) -> (logits [b, v] of that place, cache)."""
    x, cache = self.transformer(self.embedded(token[:, None], index), cache=cache, index=index)
    return self.logits(x)[:, 0], cache


class Captioner(nn.Module):
  """An image network whose tokens, [b, n, d], are what a text decoder looks at."""

  image: nn.Module  # (image, *, train, return_weights) -> (pooled [b, d], out)
  text: TextDecoder

  def encode_image(self, image, *, train: bool = False, return_weights: bool | str = False):
    """The image network alone: as `ViT.__call__`."""
    return self.image(image, train=train, return_weights=return_weights)

  def __call__(self, image, ids, *, train: bool = False, return_weights: bool = False):
    """image [b, h, w, c], ids int [b, l] -> as `TextDecoder.__call__`."""
    _, out = self.image(image, train=train)
    return self.text(ids, out["tokens"], train=train, return_weights=return_weights)

  def begin(self, image):
    """image [b, h, w, c] -> as `TextDecoder.begin`."""
    return self.text.begin(self.image(image)[1]["tokens"])

  def step(self, cache, token, index):
    """As `TextDecoder.step`."""
    return self.text.step(cache, token, index)


IMAGE_NETWORK = "image"  # the part that other runs start from


def make(*, backbone: Literal[*backbones.BACKBONES] = "vit", image_size, channels: int,
         variant: str | int = "", dtype: Literal[*vit.DTYPES] = "float32",
         vocab_size: int | None = None, context: int | None = None, eos_id: int | None = None,
         pad_id: int | None = None,
         **fields: (*backbones.NETWORKS, dict(text_=TextDecoder))) -> Captioner:
  """An image network, by any field of `models/BACKBONE.py`, and a decoder of its texts.

  Args:
    backbone: of the image network.
    variant: its own, such as "B/16".
    image_size, channels, dtype: of the data, and of computation.
    vocab_size, context, eos_id, pad_id: the tokenizer's.

  Fields of `TextDecoder` begin with text_, see `text.build`. Raises ValueError as
  `backbones.make` and `text.build`.
  """
  decoder = text.build(TextDecoder, fields, dtype=dtype, vocab_size=vocab_size, context=context,
                      eos_id=eos_id, pad_id=pad_id)
  fields |= {"variant": variant} if variant else {}
  image = backbones.make(backbone, image_size=image_size, channels=channels, dtype=dtype, **fields)
  if isinstance(image, vit.ViT) and image.placement == decoder.placement == "deepnorm":
    image = image.clone(read_by=decoder.depth)
  return Captioner(image, decoder)
