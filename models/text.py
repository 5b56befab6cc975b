"""Text Transformer: token and position embeddings, a Transformer, pooling (2103.00020 sec. 2.4)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models import masks, positions, vit
from models.transformer import Style, Transformer, choices

# Features are the token at the first `eos_id`, at the largest id (OpenAI's code: their end-of-text
# token has it), the last token (SigLIP), or attention pooling.
POOLS = ("eos", "argmax", "last", "map")

# Fields whose value is a name, and the names: checked before anything is built.
CHOICES = {**vit.CHOICES, "pool": POOLS,
           "positions": ("none", "learned", "sinusoidal", *positions.RELATIVE)}
del CHOICES["patch_stem"], CHOICES["resample"]


def clip_kernels(rng, blocks):
  """Initial kernels of CLIP's text tower as released: normal, with a spread by width and depth."""
  depth, width = blocks["attention"]["qkv_kernel"].shape[:2]
  branch = (2 * depth * width) ** -0.5
  spread = {"attention/qkv_kernel": width**-0.5, "attention/out/kernel": branch,
            "mlp/up/kernel": (2 * width) ** -0.5, "mlp/down/kernel": branch}
  blocks = flatten_dict(blocks, sep="/")
  for key, (path, std) in zip(jax.random.split(rng, len(spread)), spread.items()):
    blocks[path] = std * jax.random.normal(key, blocks[path].shape)
  return unflatten_dict(blocks, sep="/")


class TextStyle(Style):
  """What networks of texts have in common: their tokens' ids, their sizes, their positions."""

  vocab_size: int
  context: int  # tokens, at most
  eos_id: int  # of the end-of-text token
  pad_id: int  # of what fills up the context
  width: int
  depth: int
  heads: int
  mlp_dim: int
  positions: str = dataclasses.field(default="learned", kw_only=True)  # one of CHOICES

  @nn.nowrap
  def make_embed(self, name: str | None = None):
    """The table of token embeddings."""
    return nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name=name,
                    embedding_init=nn.initializers.normal(0.02))

  @nn.nowrap
  def make_positions(self):
    """What is added to the tokens of a text, [context, d]; None where nothing is."""
    if self.positions == "learned":
      return self.param("position", nn.initializers.normal(0.01), (self.context, self.width))
    if self.positions in positions.FIXED:
      return positions.FIXED[self.positions]((self.context,), self.width)
    return None

  @nn.nowrap
  def check(self, length: int):
    """Raises ValueError on positions that texts have not, and on texts longer than the context."""
    if self.positions not in CHOICES["positions"]:
      raise ValueError(f"model.text_positions = {self.positions!r}: expected one of "
                       + ", ".join(CHOICES["positions"]))
    if length > self.context:
      raise ValueError(f"texts of {length} tokens: model.context is {self.context}")


class TextTower(TextStyle):
  """`__call__` gives (pooled features, named intermediates), as `models.vit.ViT`."""

  pool: str = "eos"  # one of POOLS
  causal: bool = True  # a token sees those before it (CLIP), else all (SigLIP)
  mask_padding: bool = False  # hides padding from attention; published towers do not
  clip_init: bool = True  # kernels start as in CLIP, else as the Transformer's own
  trained: int = 0  # as in `models.transformer.Transformer`
  embed_norm: bool = False  # norm, and dropout, of what is embedded (BERT)
  segments: int = 0  # kinds of segments that are told apart by an embedding (BERT: 2); 0: none

  @nn.compact
  def __call__(self, ids, segments=None, mask=None, *, train: bool = False):
    """ids int [b, l] -> ([b, d], {tokens [b, l, d], features [b, d]}).

    `segments` int [b, l] says which segment each token is of, None: all of the first. `mask` is
    bool, broadcastable to [b, k, l, l], True = attend, beside `causal` and `mask_padding`. A text
    without `eos_id` is pooled at its first token, as Hugging Face's CLIP does. Raises ValueError on
    texts longer than the context.
    """
    length = ids.shape[1]
    self.check(length)
    x = self.make_embed("embed")(ids)                                        # b l d
    table = self.make_positions()                                            # context d
    if table is not None:
      x = x + table[None, :length].astype(self.dtype)
    if self.segments:
      table = self.param("segment", nn.initializers.normal(0.02), (self.segments, self.width))
      x = x + jnp.take(table, jnp.zeros_like(ids) if segments is None else segments,
                       axis=0).astype(self.dtype)                            # b l d
    if self.embed_norm:
      x = nn.Dropout(self.dropout)(self.make_norm("embed_norm")(x), deterministic=not train)
    place = jnp.arange(length)[None]                                         # 1 l
    end = (ids if self.pool == "argmax" else ids == self.eos_id).argmax(1)[:, None]  # b 1
    padding = None
    if self.mask_padding:  # up to the end all is text: padding may have the end's id
      padding = masks.padding((ids != self.pad_id) | (place <= end))         # b 1 1 l
    x = Transformer(self.depth, self.heads, self.mlp_dim, causal=self.causal, grid=(self.context,),
                    trained=self.trained, redraw=clip_kernels if self.clip_init else None,
                    **choices(self, Style), name="transformer")(
                      x, nn.combine_masks(padding, mask, dtype=bool), train=train)
    if self.pool == "map":
      features = vit.AttentionPool(self.heads, self.mlp_dim, self.activation, self.norm_eps,
                               self.dtype, name="map_pool")(x, padding)
    elif self.pool == "last":
      features = x[:, -1]
    else:
      features = jnp.take_along_axis(x, end[:, :, None], axis=1)[:, 0]       # b d
    return features, {"tokens": x, "features": features}
