"""Text Transformer: token and position embeddings, a Transformer, pooling (2103.00020 sec. 2.4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models.transformer import Transformer
from models.vit import AttentionPool

# Features are the token at the first `eos_id`, at the largest id (OpenAI's code: their end-of-text
# token has it), the last token (SigLIP), or attention pooling.
POOLS = ("eos", "argmax", "last", "map")


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


class TextTower(nn.Module):
  """`__call__` gives (pooled features, named intermediates), as `models.vit.ViT`."""

  vocab_size: int
  context: int  # tokens, at most
  eos_id: int  # of the end-of-text token
  pad_id: int  # of what fills up the context
  width: int
  depth: int
  heads: int
  mlp_dim: int
  pool: str = "eos"  # one of POOLS
  causal: bool = True  # a token sees those before it (CLIP), else all (SigLIP)
  mask_padding: bool = False  # hides padding from attention; published towers do not
  clip_init: bool = True  # kernels start as in CLIP, else as the Transformer's own
  activation: str = "gelu"
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  attention: str = "auto"
  dropout: float = 0.0  # rate, [0, 1)
  scan: bool = False
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids, *, train: bool = False):
    """ids int [b, l] -> ([b, d], {tokens [b, l, d], features [b, d]}).

    A text without `eos_id` is pooled at its first token, as Hugging Face's CLIP does. Raises
    ValueError on texts longer than the context.
    """
    length = ids.shape[1]
    if length > self.context:
      raise ValueError(f"texts of {length} tokens: model.context is {self.context}")
    x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02),
                 dtype=self.dtype, name="embed")(ids)                        # b l d
    table = self.param("position", nn.initializers.normal(0.01), (self.context, self.width))
    x = x + table[None, :length].astype(self.dtype)
    place = jnp.arange(length)[None]                                         # 1 l
    end = (ids if self.pool == "argmax" else ids == self.eos_id).argmax(1)[:, None]  # b 1
    before = padding = None
    if self.causal:
      before = (place.T >= place)[None, None]                                # 1 1 l l
    if self.mask_padding:  # up to the end all is text: padding may have the end's id
      padding = ((ids != self.pad_id) | (place <= end))[:, None, None]       # b 1 1 l
    x = Transformer(
      self.depth, self.heads, self.mlp_dim, self.activation, self.norm, self.norm_eps,
      self.attention, dropout=self.dropout, scan=self.scan, remat=self.remat, dtype=self.dtype,
      redraw=clip_kernels if self.clip_init else None, name="transformer")(
        x, nn.combine_masks(before, padding, dtype=bool), train=train)
    if self.pool == "map":
      features = AttentionPool(self.heads, self.mlp_dim, self.activation, self.norm_eps,
                               self.dtype, name="map_pool")(x, padding)
    elif self.pool == "last":
      features = x[:, -1]
    else:
      features = jnp.take_along_axis(x, end[:, :, None], axis=1)[:, 0]       # b d
    return features, {"tokens": x, "features": features}
