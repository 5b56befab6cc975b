"""Text Transformer: token and position embeddings, a Transformer, pooling (2103.00020 sec. 2.4)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models import layers, masks, positions, vit
from models.transformer import Style, Transformer, check, choices

# Features are the token at the first `eos_id`, at the largest id (OpenAI's code: their end-of-text
# token has it), the first token (BERT), the last (SigLIP), or attention pooling.
POOLS = ("eos", "argmax", "first", "last", "map")
TOKENIZER = ("vocab_size", "context", "eos_id", "pad_id")  # fields that the tokenizer says
# What a text network has of the image network beside it, where nothing is said of itself.
SHARED = ("activation", "norm", "norm_eps", "placement", "qk_norm", "attention", "scan", "remat")

POSITIONS = ("none", "learned", "sinusoidal", *positions.RELATIVE)


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
  width: int  # features of a token
  depth: int  # blocks
  heads: int  # of attention; they divide the width
  mlp_dim: int  # features inside an MLP; where nothing is said four times the width
  positions: Literal[*POSITIONS] = dataclasses.field(default="learned", kw_only=True)
  trained: int = dataclasses.field(default=0, kw_only=True)  # as in `transformer.Transformer`

  @nn.nowrap
  def make_embed(self, name: str | None = None):
    """The table of token embeddings."""
    return nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name=name,
                    embedding_init=self.table_init(0.02))

  @nn.nowrap
  def table_init(self, std: float):
    """What tables of embeddings start from: the blocks' own, where that is not Xavier's."""
    if self.kernel_init in ("normal", "truncated"):
      return layers.KERNEL_INITS[self.kernel_init]
    return nn.initializers.normal(std)

  @nn.nowrap
  def make_positions(self):
    """What is added to the tokens of a text, [context, d]; None where nothing is.

    The tokens are not multiplied by sqrt(d) before, as 1706.03762 sec. 3.4 has it.
    """
    if self.positions == "learned":
      return self.param("position", self.table_init(0.01), (self.context, self.width))
    if self.positions in positions.FIXED:
      return positions.FIXED[self.positions]((self.context,), self.width)
    return None

  @nn.nowrap
  def check_length(self, length: int):
    """Raises ValueError on texts longer than the context."""
    if length > self.context:
      raise ValueError(f"texts of {length} tokens: model.context is {self.context}")


class TextTower(TextStyle):
  """`__call__` gives (pooled features, named intermediates), as `models.vit.ViT`."""

  pool: Literal[*POOLS] = "eos"  # which token the features are, as beside POOLS; or attention
  causal: bool = True  # a token sees those before it (CLIP), else all (SigLIP)
  mask_padding: bool = False  # hides padding from attention; published towers do not
  clip_init: bool = True  # kernels start as in CLIP, else, and for DeepNorm, as the Transformer's
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
    self.check_length(length)
    x = self.make_embed("embed")(ids)                                        # b l d
    table = self.make_positions()                                            # context d
    if table is not None:
      x = x.astype(self.stream) + table[None, :length].astype(self.stream)
    if self.segments:
      table = self.param("segment", self.table_init(0.02), (self.segments, self.width))
      x = x + jnp.take(table, jnp.zeros_like(ids) if segments is None else segments,
                       axis=0).astype(self.stream)                           # b l d
    if self.embed_norm:
      x = nn.Dropout(self.dropout)(self.make_norm("embed_norm", self.stream)(x),
                                   deterministic=not train)
    place = jnp.arange(length)[None]                                         # 1 l
    end = (ids if self.pool == "argmax" else ids == self.eos_id).argmax(1)[:, None]  # b 1
    padding = None
    if self.mask_padding:  # up to the end all is text: padding may have the end's id
      padding = masks.padding((ids != self.pad_id) | (place <= end))         # b 1 1 l
    redraw = clip_kernels if self.clip_init and self.placement != "deepnorm" else None
    x = Transformer(self.depth, self.heads, self.mlp_dim, causal=self.causal, grid=(self.context,),
                    trained=self.trained, redraw=redraw, **choices(self, Style),
                    name="transformer")(x, nn.combine_masks(padding, mask, dtype=bool), train=train)
    if self.pool == "map":
      features = vit.AttentionPool(self.heads, self.mlp_dim, self.activation, self.norm,
                                   self.norm_eps, self.dtype, name="map_pool")(x, padding)
    elif self.pool in ("first", "last"):
      features = x[:, 0 if self.pool == "first" else -1]
    else:
      features = jnp.take_along_axis(x, end[:, :, None], axis=1)[:, 0]       # b d
    return features, {"tokens": x, "features": features}


def fields_of(network: type, prefix: str = "text_") -> list[str]:
  """What a config may say of a text network: all but what its tokenizer says."""
  return [prefix + f.name for f in dataclasses.fields(network)
          if f.name not in ("parent", "name", "dtype", *TOKENIZER)]


def build(network: type, fields: dict, *, prefix: str = "text_", variant: str = "", dtype,
          **tokenizer):
  """A text network by those of `fields` that begin with `prefix`; they are taken out of `fields`.

  What is left there, an image network's, it has too as SHARED says. Where nothing is said mlp_dim
  is four times the width. `tokenizer` has the TOKENIZER's fields, None where there is none. Raises
  ValueError on what is missing (a `variant` would have it), out of range or does not fit together.
  """
  if None in tokenizer.values():
    raise ValueError("model: it needs texts: set data.tokenizer, for data that has them")
  own = {name.removeprefix(prefix): fields.pop(name) for name in fields_of(network, prefix)
         if name in fields}
  missing = [prefix + name for name in ("width", "depth", "heads") if name not in own]
  if missing:
    either = f"variant (such as {variant!r}) or " if variant else ""
    raise ValueError(f"model: give {either}all of {', '.join(missing)}")
  shared = {name: fields[name] for name in SHARED if name in fields}
  made = network(**tokenizer, **{"mlp_dim": 4 * own["width"], **shared, **own},
                 dtype=jnp.dtype(dtype))
  if made.positions not in POSITIONS:
    raise ValueError(f"model.{prefix}positions = {made.positions!r}: expected one of "
                     + ", ".join(POSITIONS))
  check(made, axes=1, prefix=prefix)
  chunks = made.positions == "rope" and getattr(made, "causal", True) and made.trained >= 2
  if made.trained and not chunks:
    raise ValueError(f"model.{prefix}trained = {made.trained}: longer texts need at least 2, "
                     f"{prefix}positions = 'rope' and causal attention")
  return made
