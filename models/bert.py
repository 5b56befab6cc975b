"""BERT (1810.04805): an encoder of texts that tells which tokens were hidden from it."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from models import text, vit
from models.layers import ACTIVATIONS, GATES

VARIANTS = {"BERT-base": dict(width=768, depth=12, heads=12),  # 1810.04805 sec. 3
            "BERT-large": dict(width=1024, depth=24, heads=16)}


class Bert(nn.Module):
  """A text tower and, on its tokens, a dense layer, a norm and its own embeddings as classes."""

  encoder: text.TextTower
  mask_id: int | None = None  # of the token that hides others
  starts: int = 0  # tokens that every text begins with before its own

  def setup(self):
    own = self.encoder
    self.head = nn.Dense(own.width, dtype=own.dtype, kernel_init=own.table_init(0.02))
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
    gated = own.activation in GATES  # the head has no second branch to gate
    x = self.head_norm(ACTIVATIONS["gelu" if gated else own.activation](self.head(x)))
    table = own.variables["params"]["embed"]["embedding"].astype(own.dtype)
    logits = jnp.einsum("bmd,vd->bmv", x, table, preferred_element_type=jnp.float32)
    return logits + self.bias[None, None]


TEXT_NETWORK = "encoder"  # the part that other runs start from


def make(*, variant: Literal["", *VARIANTS] = "", dtype: Literal[*vit.DTYPES] = "float32",
         pool: Literal["eos", "argmax", "first", "last"] = "first", vocab_size: int | None = None,
         context: int | None = None, eos_id: int | None = None, pad_id: int | None = None,
         mask_id: int | None = None, starts: int = 0, **fields: text.TextTower) -> Bert:
  """An encoder by `variant`, one of VARIANTS, and any field of `text.TextTower`.

  Args:
    variant: one of VARIANTS.
    pool: which token the features are: the end's, the largest id's, the first or the last.
    dtype: of computation.
    vocab_size, context, eos_id, pad_id, mask_id, starts: the tokenizer's.

  Where nothing is said it is BERT's: norms after the branches and the embeddings, two kinds of
  segments, attention to all but padding, and features of the first token. Raises
  ValueError as `text.build`.
  """
  bert = dict(placement="post", norm_eps=1e-12, causal=False, mask_padding=True, clip_init=False,
              embed_norm=True, segments=2, pool=pool, kernel_init="truncated")
  tower = text.build(
    text.TextTower, {**bert, **VARIANTS.get(variant, {}), **fields}, prefix="", dtype=dtype,
    variant=next(iter(VARIANTS)), vocab_size=vocab_size, context=context, eos_id=eos_id,
    pad_id=pad_id)
  return Bert(tower, mask_id, starts)
