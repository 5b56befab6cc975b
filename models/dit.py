"""Diffusion Transformer (2212.09748): its norms are steered by time and label (adaLN-Zero)."""

import difflib
import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from models import kernels, positions, vit
from models.attention import ATTENTION, Attention
from models.layers import Mlp
from models.positions import ABSOLUTE
from models.transformer import REMAT, check_heads, init_blocks, run_blocks, split_by_example


class Size(NamedTuple):
  width: int
  depth: int
  heads: int


SIZES = {  # 2212.09748 table 1
  "S": Size(384, 12, 6),
  "B": Size(768, 12, 12),
  "L": Size(1024, 24, 16),
  "XL": Size(1152, 28, 16),
}


MLPS = {"gelu": "gelu_tanh", "swiglu": "swiglu"}  # keys of layers.ACTIVATIONS


# --- Time and label -------------------------------------------------------------------------------

def timestep_features(t, features: int = 256):
  """[cos | sin] of times times frequencies from 1 to 1/10^4: [b] -> [b, features], float32.

  1706.03762 sec. 3.5 for real-valued times, on the scale of 1000 steps.
  """
  # Exponents are rounded to float32 as everybody's are: at time 999 it shows in the fifth digit.
  exponents = -np.float32(np.log(10_000)) * np.arange(features // 2, dtype=np.float32)
  frequencies = np.exp(exponents / (features // 2), dtype=np.float64).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Condition(nn.Module):
  """Time (`timestep_features` and two dense layers) plus label, as one vector."""

  width: int
  num_classes: int = 0  # 0: no labels
  features: int = 256  # of time
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t, label=None):
    """t [b], label [b] -> [b, width].

    `num_classes` is the null label ("none given"), with a row of its own, and what None stands for.
    """
    init = nn.initializers.normal(0.02)
    dense = functools.partial(nn.Dense, self.width, kernel_init=init, dtype=self.dtype)
    x = nn.silu(dense(name="time_in")(timestep_features(t, self.features)))
    x = dense(name="time_out")(x)                                            # b d
    if self.num_classes:
      label = jnp.full(t.shape, self.num_classes) if label is None else label
      x = x + nn.Embed(self.num_classes + 1, self.width, embedding_init=init, dtype=self.dtype,
                       name="label")(label)
    return x


# --- Blocks ---------------------------------------------------------------------------------------

def modulated_norm(x, shift, scale):
  """LayerNorm of x [b, n, d] whose scale and shift [b, 1, d] are the example's, in their type."""
  ones = jnp.ones(x.shape[-1])
  return (kernels.layer_norm(x, ones, jnp.zeros_like(ones), 1e-6, shift.dtype) * (1 + scale)
          + shift)


class Block(nn.Module):
  """adaLN-Zero block (2212.09748 sec. 3.2, fig. 3): the identity until its gates have learned."""

  heads: int
  mlp_dim: int
  mlp: str = "gelu"
  qk_norm: bool = False
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, c, rotate=None):
    """x [b, n, d], c [b, d] the condition after SiLU -> [b, n, d]."""
    modulation = nn.Dense(6 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=self.dtype,
                          name="modulation")(c)[:, None]                     # b 1 6d
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
    attention = Attention(self.heads, self.qk_norm, fused_init=True, attention=self.attention,
                          dtype=self.dtype, name="attention")
    y = gate_1 * attention(modulated_norm(x, shift_1, scale_1), rotate=rotate)
    x = x + y.astype(x.dtype)
    mlp = Mlp(self.mlp_dim, MLPS[self.mlp], dtype=self.dtype, name="mlp")
    return x + (gate_2 * mlp(modulated_norm(x, shift_2, scale_2))).astype(x.dtype)


class Final(nn.Module):
  """Tokens to pixels: [b, n, d], [b, d] -> [b, n, outputs] in float32, zeros at first."""

  outputs: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, c):
    dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
    modulation = dense(2 * x.shape[-1], dtype=self.dtype, name="modulation")(c)[:, None]
    shift, scale = jnp.split(modulation, 2, axis=-1)                         # b 1 d
    return dense(self.outputs, dtype=jnp.float32, name="projection")(
      modulated_norm(x, shift, scale))


class DiT(nn.Module):
  """A denoiser: what the network says of x at time t, given a label."""

  image_size: tuple[int, int]  # pixels (h, w), or of latents: what learned positions are made for
  channels: int
  patch: int  # pixels
  width: int  # features of a token
  depth: int  # blocks
  mlp_dim: int  # features inside an MLP; where nothing is said four times the width
  heads: int  # of attention; they divide the width
  num_classes: int = 0  # 0: unconditional, any label is ignored
  learn_sigma: bool = False  # twice the channels out: [prediction | variance] (2102.09672)
  positions: Literal[*ABSOLUTE] = "sincos2d"  # added to tokens
  rope: bool = False  # rotary positions too
  mlp: Literal[*MLPS] = "gelu"  # its activation
  qk_norm: bool = False  # norms of queries and keys
  attention: Literal[*ATTENTION] = "auto"  # what computes it
  scan: bool = False  # as in models.transformer.Transformer
  remat: Literal[*REMAT] = "none"  # what is computed again for the gradient
  float32_stream: bool = True  # as in models.blocks.BlockStyle
  dtype: jnp.dtype = jnp.float32

  @property
  def grid(self) -> tuple[int, int]:
    return (self.image_size[0] // self.patch, self.image_size[1] // self.patch)

  @nn.compact
  def __call__(self, x, t, label=None, *, train: bool = False):
    """x [b, h, w, c], t [b] (of 1000), label [b] (`num_classes` or None: null) -> [b, h, w, c].

    Twice the channels with `learn_sigma`; float32. A label that has no row gives NaN. `train`
    changes nothing here: there is no dropout.
    """
    grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
    c = nn.silu(Condition(self.width, self.num_classes, dtype=self.dtype,
                          name="condition")(t, label))                       # b d
    x = vit.PatchEmbed(self.width, "xavier", dtype=self.dtype, name="embed")(
      vit.patchify(x, self.patch))                                           # b n d
    x = x.astype(jnp.float32 if self.float32_stream else self.dtype)
    table = vit.Positions(self.positions, self.grid, self.width, name="position")(grid)
    if table is not None:
      x = x + table[None].astype(x.dtype)
    rotate = None
    if self.rope:
      from models import relative  # loaded where it is used
      rotate = relative.rope(grid, self.width // self.heads)
    block = Block(self.heads, self.mlp_dim, self.mlp, self.qk_norm, self.attention, self.dtype,
                  parent=None)

    params = self.param("blocks", init_blocks, block, self.depth,            # leaves: depth ...
                        jnp.zeros((1, *x.shape[1:]), x.dtype),
                        jnp.zeros((1, self.width), self.dtype))

    def step(x, layer):
      return block.apply({"params": layer}, split_by_example(x), c, rotate), None

    x, _ = run_blocks(step, x, params, scan=self.scan, remat=self.remat)
    outputs = self.patch**2 * self.channels * (2 if self.learn_sigma else 1)
    x = Final(outputs, self.dtype, name="final")(split_by_example(x), c)     # b n p*p*c
    return vit.unpatchify(x, self.patch, grid)


def parse_variant(variant: str) -> dict[str, int]:
  """`"XL/2"` -> width, depth, heads and patch. Raises ValueError on an unknown one."""
  size, _, patch = variant.partition("/")
  if size not in SIZES or not patch.isdigit() or int(patch) < 1:
    close = difflib.get_close_matches(variant, [f"{s}/{p}" for s in SIZES for p in (2, 4, 8)], 1)
    raise ValueError(f"model.variant = {variant!r}: expected SIZE/PATCH such as 'XL/2', with SIZE "
                     f"one of {', '.join(SIZES)} and PATCH in pixels"
                     + (f"; did you mean {close[0]!r}?" if close else ""))
  return {**SIZES[size]._asdict(), "patch": int(patch)}


def make(*, variant: str = "", image_size, channels: int, num_classes: int = 0,
         dtype: Literal[*vit.DTYPES] = "float32", **fields: DiT) -> DiT:
  """A DiT by `variant` ("XL/2") and any field of `DiT`, which goes before the variant's.

  Args:
    variant: a size of SIZES and the patch in pixels or latents, such as "XL/2".
    image_size, channels: of the data.
    num_classes: of labels, None: as many as the data has; 0: none are given.
    dtype: of computation.

  `mlp_dim` is 4 x width unless given. Raises ValueError on an unknown variant or sizes that do not
  fit together.
  """
  fields = {**(parse_variant(variant) if variant else {}), **fields}
  missing = [name for name in ("patch", *Size._fields) if name not in fields]
  if missing:
    raise ValueError(f"model: give variant (such as 'XL/2') or all of {', '.join(missing)}")
  width, heads = fields["width"], fields["heads"]
  fields.setdefault("mlp_dim", 4 * width)
  image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  vit.check_patch(image_size, fields["patch"])
  check_heads(width, heads)
  if fields.get("rope"):
    positions.check("rope", width // heads, axes=2, field="rope")
  return DiT(image_size=image_size, channels=channels, num_classes=num_classes,
             dtype=jnp.dtype(dtype), **fields)
