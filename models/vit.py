"""Vision Transformer (2010.11929): patches, positions, a Transformer, pooling, a linear head."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from models import layers, positions
from models.attention import Attention
from models.positions import KINDS, RESAMPLE
from models.transformer import Style, Transformer, check, choices


class Size(NamedTuple):
  width: int
  depth: int
  mlp_dim: int
  heads: int


SIZES = {
  "Ti": Size(192, 12, 768, 3),  # 2106.10270
  "S": Size(384, 12, 1536, 6),  # 2106.10270
  "M": Size(512, 12, 2048, 8),
  "B": Size(768, 12, 3072, 12),  # 2010.11929
  "L": Size(1024, 24, 4096, 16),  # 2010.11929
  "So400m": Size(1152, 27, 4304, 16),  # 2305.13035
  "H": Size(1280, 32, 5120, 16),  # 2010.11929
  "g": Size(1408, 40, 6144, 16),  # 2106.04560
  "G": Size(1664, 48, 8192, 16),  # 2106.04560
}

POOLS = ("cls", "mean", "map", "none")
DTYPES = ("float32", "bfloat16", "float16")
PATCH_INITS = {  # what the kernel of the patch embedding starts from
  "lecun": nn.initializers.lecun_normal(),  # as big_vision's convolution
  "xavier": nn.initializers.xavier_uniform(),  # over the whole patch (MAE, MoCo v3)
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # PyTorch's convolution
}

def parse_variant(variant: str) -> dict[str, int]:
  """`"B/16"` -> width, depth, mlp_dim, heads and patch. Raises ValueError on an unknown one."""
  size, _, patch = variant.partition("/")
  if size not in SIZES or not patch.isdigit() or int(patch) < 1:
    raise ValueError(f"model.variant = {variant!r}: expected SIZE/PATCH such as 'B/16', with SIZE "
                     f"one of {', '.join(SIZES)} and PATCH in pixels")
  return {**SIZES[size]._asdict(), "patch": int(patch)}


def patchify(image, patch: int):
  """Row-major patches with pixels in (p, q, c) order: [b, h, w, c] -> [b, n, p * p * c]."""
  return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches, patch: int, grid: tuple[int, int]):
  """The inverse of `patchify`: [b, n, p * p * c] -> [b, h, w, c]."""
  return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], p=patch, q=patch)


class PatchEmbed(nn.Module):
  """A dense layer on patches: the strided convolution of ViT, said as the matrix product it is."""

  width: int
  init: str = "lecun"  # a key of PATCH_INITS
  dtype: jnp.dtype = jnp.float32
  use_bias: bool = True

  @nn.compact
  def __call__(self, patches):
    return nn.Dense(self.width, self.use_bias, kernel_init=PATCH_INITS[self.init],
                    dtype=self.dtype, name="projection")(patches.astype(self.dtype))  # b n d


class Positions(nn.Module):
  """Position embeddings of a grid of patches, as a table [n, d]; None where there are none."""

  kind: str  # one of positions.KINDS
  grid: tuple[int, int]  # patches; the grid that a learned table is made for
  width: int
  resample: str = "antialias"  # a key of positions.RESAMPLE
  std: float = 0.02  # of learned ones at the start

  @nn.compact
  def __call__(self, grid: tuple[int, int]):
    if self.kind in ("none", *positions.RELATIVE):
      return None
    if self.kind in positions.FIXED:  # of the grid it is made for: another's would be farther out
      table = jnp.asarray(positions.FIXED[self.kind](self.grid, self.width))
    else:
      table = self.param("table", nn.initializers.normal(self.std),
                         (self.grid[0] * self.grid[1], self.width))
    return positions.resample(table, self.grid, grid, self.resample)


class AttentionPool(nn.Module):
  """Attention pooling by one learned probe (2106.04560 sec. 3.2): [b, n, d] -> [b, d].

  `mask` broadcastable to [b, k, 1, n], True = attend.
  """

  heads: int
  mlp_dim: int
  activation: str = "gelu"
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None):
    b, _, d = x.shape
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d)).astype(self.dtype)
    x = Attention(self.heads, dtype=self.dtype, name="attention")(
      jnp.broadcast_to(probe, (b, 1, d)), memory=x, mask=mask)               # b 1 d
    y = layers.NORMS[self.norm](epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
    return (x + layers.Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(y))[:, 0]


class ViT(Style, kw_only=True):
  """`__call__` gives (logits or pooled features, named intermediates)."""

  image_size: tuple[int, int]  # pixels (h, w): what learned positions are made for
  channels: int
  patch: int  # pixels
  width: int  # features of a token
  depth: int  # blocks
  mlp_dim: int  # features inside an MLP
  heads: int  # of attention; they divide the width
  num_classes: int = 0  # 0: no head, the pooled features are the output
  patch_stem: Literal["patches", "resnet", "early_conv"] = "patches"  # what is embedded
  pool: Literal[*POOLS] = "cls"  # what the features are: class token, mean, attention, all tokens
  pool_before_norm: bool = False  # norm after pooling (timm's and MAE's fc_norm), not on tokens
  class_token: bool | None = None  # None: as the pooling needs
  class_position: bool = True  # with learned positions the class token has one too
  registers: int = 0  # tokens (2309.16588)
  patch_bias: bool = True  # of the patch embedding
  patch_init: Literal["", *PATCH_INITS] = ""  # "": xavier with fused_init, else lecun
  pre_norm: bool = False  # a norm before the first block too (CLIP)
  positions: Literal[*KINDS] = "learned"
  position_init: float = 0.02  # standard deviation of learned ones at the start
  token_init: float = 0.02  # that of the class token and of registers
  resample: Literal[*RESAMPLE] = "antialias"  # positions to another grid
  pre_logits: int = 0  # features of a dense layer with tanh before the head (2010.11929); 0: none
  head_init: float = 0.0  # standard deviation of the head's kernel at the start; 0: zeros
  head_bias_init: float = 0.0  # the head's bias at the start
  probe_norm: bool = False  # batch norm, without scale and bias, before the head (MAE's probe)
  bn_groups: int = 1  # of that: see `models.batch_norm.BatchNorm`
  read_by: int = 0  # depth of a decoder that reads its tokens: for DeepNorm

  @property
  def grid(self) -> tuple[int, int]:
    return (self.image_size[0] // self.patch, self.image_size[1] // self.patch)

  @property
  def has_class_token(self) -> bool:
    return self.pool == "cls" if self.class_token is None else self.class_token

  @property
  def has_class_position(self) -> bool:
    return self.has_class_token and self.class_position and self.positions == "learned"

  def setup(self):
    if self.patch_stem != "patches":
      from models.stems import STEMS  # loaded where it is used: most networks embed patches
      self.convolutions = STEMS[self.patch_stem](self.width, self.patch, self.dtype)
    self.embed = PatchEmbed(
      self.width, self.patch_init or ("xavier" if self.fused_init else "lecun"), self.dtype,
      self.patch_bias)
    self.position = Positions(self.positions, self.grid, self.width, self.resample,
                              self.position_init)
    if self.has_class_token:
      self.cls = self.param("cls", nn.initializers.normal(self.token_init), (1, 1, self.width))
      if self.has_class_position:
        self.cls_position = self.param("cls_position", nn.initializers.normal(self.position_init),
                                       (1, 1, self.width))
    if self.registers:
      self.register_tokens = self.param("registers", nn.initializers.normal(self.token_init),
                                        (1, self.registers, self.width))
    self.transformer = Transformer(self.depth, self.heads, self.mlp_dim, grid=self.grid,
                                   final_norm=not self.pool_before_norm,
                                   decoder_depth=self.read_by, **choices(self, Style))
    if self.pre_norm:
      self.input_norm = self.make_norm(dtype=self.stream)
    if self.pool_before_norm:
      self.pool_norm = self.make_norm()
    if self.pool == "map":
      self.map_pool = AttentionPool(self.heads, self.mlp_dim, self.activation, self.norm,
                                    self.norm_eps, self.dtype)
    if self.probe_norm:
      from models.batch_norm import BatchNorm
      self.head_norm = BatchNorm(self.bn_groups, affine=False, epsilon=1e-6, dtype=jnp.float32)
    if self.num_classes and self.pre_logits:
      self.representation = nn.Dense(self.pre_logits, dtype=self.dtype)
    if self.num_classes:
      self.head = nn.Dense(self.num_classes, kernel_init=layers.head_kernel(self.head_init),
                           bias_init=nn.initializers.constant(self.head_bias_init),
                           dtype=jnp.float32)

  @property
  def prefix(self) -> int:
    """How many tokens stand before the patches."""
    return int(self.has_class_token) + self.registers

  @nn.nowrap
  def pool_shares(self, patches: int):
    """What each of prefix + n tokens counts for the features: [q], sum 1.

    The class token alone for pool = "cls", else all patches alike (of "map" a simplification).
    """
    chosen = 0 if self.pool == "cls" else slice(self.prefix, None)
    shares = jnp.zeros(self.prefix + patches).at[chosen].set(1.0)
    return shares / shares.sum()

  @nn.nowrap
  def filters(self, params):
    """The filters of the first layer, [d, p, p, c]."""
    if self.patch_stem != "patches":
      from models.stems import first_filters
      return first_filters(params["convolutions"])
    return rearrange(params["embed"]["projection"]["kernel"], "(p q c) d -> d p q c",
                     p=self.patch, q=self.patch)

  @nn.nowrap
  def position_table(self, params):
    """The position embeddings of the grid it is made for, [n, d]; None where there are none."""
    table = Positions(self.positions, self.grid, self.width)
    return table.apply({"params": params.get("position", {})}, self.grid)

  def encode(self, patches, grid: tuple[int, int], keep=None, *, train: bool = False,
             return_weights: bool | str = False):
    """patches [b, n, p*p*c] -> tokens [b, prefix + m, d], of the patches `keep` [b, m] if given.

    Of another stem they are its features. Dropped patches are never embedded, so they cost nothing
    (2111.06377 sec. 3).
    """
    table = self.position(grid)                                              # n d
    if keep is not None:
      patches = jnp.take_along_axis(patches, keep[:, :, None], axis=1)       # b m p*p*c
    x = self.embed(patches).astype(self.stream)                              # b m d
    if table is not None:
      table = table.astype(self.stream)
      x = x + (table[None] if keep is None else jnp.take(table, keep, axis=0))
    prefix = []
    if self.has_class_token:
      cls = self.cls + self.cls_position if self.has_class_position else self.cls
      prefix.append(cls)
    if self.registers:
      prefix.append(self.register_tokens)
    prefix = [jnp.broadcast_to(t.astype(self.stream), (x.shape[0], *t.shape[1:])) for t in prefix]
    x = jnp.concatenate([*prefix, x], axis=1)                                # b prefix+m d
    x = self.input_norm(x) if self.pre_norm else x
    return self.transformer(x, grid=grid, keep=keep, train=train, return_weights=return_weights)

  def pooled(self, tokens):
    """tokens [b, prefix + n, d] -> [b, d] (or all tokens for pool = "none")."""
    if self.pool == "cls":
      x = tokens[:, 0]
    elif self.pool == "mean":
      x = jnp.mean(tokens[:, self.prefix:], axis=1)  # the class token is left out, as in timm, MAE
    elif self.pool == "map":
      x = self.map_pool(tokens)
    else:
      x = tokens
    return self.pool_norm(x) if self.pool_before_norm else x

  def __call__(self, image, *, train: bool = False, return_weights: bool | str = False):
    """image [b, h, w, c], any h and w that the patch divides -> ([b, classes] or [b, d], out).

    out: `tokens` [b, n, d] of the patches, `features` [b, d] and, if asked for, `weights`: with
    True [b, k, q, q] of the last block, with "all" [b, depth, k, q, q].
    """
    grid = (image.shape[1] // self.patch, image.shape[2] // self.patch)
    patches = (patchify(image, self.patch) if self.patch_stem == "patches" else
               self.convolutions(image, train=train))
    tokens = self.encode(patches, grid, train=train, return_weights=return_weights)
    tokens, weights = tokens if return_weights else (tokens, None)
    features = self.pooled(tokens)
    out = {"tokens": tokens[:, self.prefix:], "features": features, "weights": weights}
    if not self.num_classes:
      return features, out
    if self.pre_logits:
      features = nn.tanh(self.representation(features))
    return self.head(self.head_norm(features, train=train) if self.probe_norm else features), out


def check_patch(image_size: tuple[int, int], patch: int):
  """Raises ValueError where an image cannot be cut into patches."""
  if patch < 1:
    raise ValueError(f"model.patch = {patch}: expected at least 1")
  if any(side % patch for side in image_size):
    raise ValueError(f"model.patch = {patch} does not divide the image size "
                     f"{image_size[0]}x{image_size[1]}: choose a patch that divides both, or set "
                     "augment.image_size to a multiple of it")


def make(*, variant: str = "", image_size, channels: int, num_classes: int = 0,
         dtype: Literal[*DTYPES] = "float32", **fields: ViT) -> ViT:
  """A ViT by `variant` ("B/16") and any field of `ViT`, which goes before the variant's.

  Args:
    variant: a size of SIZES and the patch in pixels, such as "B/16".
    image_size, channels: of the data.
    num_classes: of labels, for the head; 0: no head. None: as many as the data has.
    dtype: of computation.

  Raises ValueError on an unknown variant or sizes that do not fit together.
  """
  fields = {**(parse_variant(variant) if variant else {}), **fields}
  missing = [name for name in ("patch", *Size._fields) if name not in fields]
  if missing:
    raise ValueError(f"model: give variant (such as 'B/16') or all of {', '.join(missing)}")
  image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  check_patch(image_size, fields["patch"])
  if fields.get("pool", ViT.pool) == "cls" and fields.get("class_token") is False:
    raise ValueError("model.pool = 'cls' needs model.class_token")
  model = ViT(image_size=image_size, channels=channels, num_classes=num_classes,
              dtype=jnp.dtype(dtype), **fields)
  check(model, axes=2)
  if model.registers < 0:
    raise ValueError(f"model.registers = {model.registers}: expected at least 0")
  if model.patch_stem != "patches":
    from models.stems import check_stem
    check_stem(model.patch_stem, model.width, model.patch)
  return model
