"""BERT (1810.04805): an encoder of texts that tells which tokens were hidden from it."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from models import text, vit
from models.layers import ACTIVATIONS

VARIANTS = {"BERT-base": dict(width=768, depth=12, heads=12),  # 1810.04805 sec. 3
            "BERT-large": dict(width=1024, depth=24, heads=16)}


class Bert(nn.Module):
  """A text tower and, on its tokens, a dense layer, a norm and its own embeddings as classes."""

  encoder: text.TextTower
  mask_id: int | None = None  # of the token that hides others
  starts: int = 0  # tokens that every text begins with before its own

  def setup(self):
    own = self.encoder
    self.head = nn.Dense(own.width, dtype=own.dtype, kernel_init=nn.initializers.normal(0.02))
    self.head_norm = own.make_norm()
    self.bias = self.param("bias", nn.initializers.zeros, (own.vocab_size,))

  def encode(self, ids, segments=None, *, train: bool = False):
    """The encoder alone: as `TextTower.__call__`."""
    return self.encoder(ids, segments, train=train)

  def __call__(self, ids, segments=None, mask=None, places=None, *, train: bool = False):
    """ids int [b, l] -> float32 logits [b, l, v] of the token at each place.

    Of `places` int [b, m] alone: [b, m, v]. `segments` and `mask` are those of `TextTower`.
    """
    own = self.encoder
    x = own(ids, segments, mask, train=train)[1]["tokens"]                   # b l d
    if places is not None:
      x = jnp.take_along_axis(x, places[:, :, None], axis=1)                 # b m d
    x = self.head_norm(ACTIVATIONS[own.activation](self.head(x)))
    table = own.variables["params"]["embed"]["embedding"].astype(own.dtype)
    logits = jnp.einsum("bmd,vd->bmv", x, table, preferred_element_type=jnp.float32)
    return logits + self.bias[None, None]


_TOKENIZER = ("vocab_size", "context", "eos_id", "pad_id")
FIELDS = {f.name: f.type for f in dataclasses.fields(text.TextTower)
          if f.name not in ("parent", "name", "dtype", *_TOKENIZER)}
TEXT_NETWORK = "encoder"  # the part that other runs start from
CHOICES = {**text.CHOICES, "variant": ("", *VARIANTS)}


def make(*, variant: str = "", dtype="float32", vocab_size: int | None = None,
         context: int | None = None, eos_id: int | None = None, pad_id: int | None = None,
         mask_id: int | None = None, starts: int = 0, **fields) -> Bert:
  """An encoder by `variant`, one of VARIANTS, and any field of `text.TextTower`.

  Where nothing is said it is BERT's: norms after the branches and the embeddings, two kinds of
  segments, attention to all but padding, and an mlp_dim of four times its width. `vocab_size`,
  `context`, `eos_id`, `pad_id`, `mask_id` and `starts` are the tokenizer's. Raises ValueError on
  sizes that are missing or do not fit together.
  """
  if None in (vocab_size, context, eos_id, pad_id):
    raise ValueError("model.name = 'bert' needs texts: set data.tokenizer, for data that has them")
  fields = {**VARIANTS.get(variant, {}), **fields}
  if missing := [name for name in ("width", "depth", "heads") if name not in fields]:
    raise ValueError(f"model: give variant (such as {next(iter(VARIANTS))!r}) or all of "
                     + ", ".join(missing))
  vit.check((), 1, fields["width"], fields["heads"])
  bert = dict(mlp_dim=4 * fields["width"], placement="post", norm_eps=1e-12, causal=False,
              mask_padding=True, clip_init=False, embed_norm=True, segments=2)
  return Bert(text.TextTower(vocab_size, context, eos_id, pad_id, dtype=jnp.dtype(dtype),
                             **{**bert, **fields}), mask_id, starts)
