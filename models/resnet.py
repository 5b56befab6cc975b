"""ResNet (1512.03385), with the stride of bottlenecks on their 3x3 convolution ("v1.5")."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from models.batch_norm import BatchNorm
from models.layers import head_kernel
from models.transformer import split_by_example


class Size(NamedTuple):
  depths: tuple[int, ...]  # blocks of each stage
  bottleneck: bool


SIZES = {  # 1512.03385 table 1; the depths of 200 are 1603.05027's
  "18": Size((2, 2, 2, 2), False),
  "34": Size((3, 4, 6, 3), False),
  "50": Size((3, 4, 6, 3), True),
  "101": Size((3, 4, 23, 3), True),
  "152": Size((3, 8, 36, 3), True),
  "200": Size((3, 24, 36, 3), True),
}


def conv(features: int, size: int, stride: int, dtype, name: str) -> nn.Conv:
  """size x size, no bias, padded by size // 2 on every side; He's init (1502.01852 eq. 14)."""
  return nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False, dtype=dtype,
                 kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"), name=name)


class Block(nn.Module):
  """A residual block, basic or bottleneck (1512.03385 fig. 5): [b, h, w, c] -> [b, h', w', c']."""

  width: int  # features of its 3x3 convolutions; a bottleneck gives 4 times as many
  stride: int
  bottleneck: bool
  zero_init: bool
  bn_groups: int
  bn_momentum: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, *, train: bool):
    norm = functools.partial(BatchNorm, self.bn_groups, self.bn_momentum, dtype=self.dtype)
    # (features, kernel size, stride); 1512.03385 strides the 1x1 before, 1706.02677 sec. 5.1 this.
    layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
    if self.bottleneck:
      layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
    y = x
    for i, (features, size, stride) in enumerate(layers):
      last = i == len(layers) - 1
      y = conv(features, size, stride, self.dtype, f"conv_{i}")(y)
      scale_init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
      y = norm(scale_init=scale_init, name=f"norm_{i}")(y, train=train)
      y = y if last else nn.relu(y)
    if self.stride > 1 or x.shape[-1] != y.shape[-1]:  # eq. 2's projection
      x = conv(y.shape[-1], 1, self.stride, self.dtype, "shortcut")(x)
      x = norm(name="shortcut_norm")(x, train=train)
    return nn.relu(x + y)


class Stage(nn.Module):
  """`depth` blocks one after another."""

  depth: int
  stride: int  # of the first block
  block: Callable[..., Block]  # (stride=..., name=...) -> Block

  @nn.compact
  def __call__(self, x, *, train: bool):
    for i in range(self.depth):
      block = self.block(stride=1 if i else self.stride, name=f"block_{i}")
      x = block(split_by_example(x), train=train)
    return x


class ResNet(nn.Module):
  """`__call__` gives (logits or pooled features, named intermediates), as `models.vit.ViT`."""

  image_size: tuple[int, int]  # pixels (h, w) of the data; any other works too
  channels: int
  depths: tuple[int, ...]  # blocks of each stage
  bottleneck: bool  # blocks of three convolutions, else of two
  widths: tuple[int, ...] = (64, 128, 256, 512)  # features of each stage's 3x3 convolutions
  num_classes: int = 0  # 0: no head, the pooled features are the output
  stem: Literal["imagenet", "small"] = "imagenet"  # 7x7 and max pooling, both strided; small, for
  #                                                   images of 32 pixels: 3x3 without stride
  stem_width: int | None = None  # features; None: widths[0]
  zero_init: bool = False  # blocks begin as the identity: their last scale is 0 (1706.02677 5.1)
  bn_groups: int = 1  # see `models.batch_norm.BatchNorm`
  bn_momentum: float = 0.9  # of the running statistics
  head_init: float = 0.0  # standard deviation of the head's kernel at the start; 0: zeros
  dtype: jnp.dtype = jnp.float32

  @nn.nowrap
  def filters(self, params):
    """The filters of the stem, [d, p, p, c]."""
    return rearrange(params["stem"]["kernel"], "p q c d -> d p q c")

  @nn.compact
  def __call__(self, image, *, train: bool = False, return_weights: bool | str = False):
    """image [b, h, w, c] -> ([b, classes] or [b, d], {features [b, d], tokens [b, n, d], weights}).

    Tokens are the last grid, row-major: with four stages h/32 x w/32 (small: h/8 x w/8). Raises
    ValueError on `return_weights`: there is no attention.
    """
    if return_weights:
      raise ValueError("attention: a ResNet has none")
    size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
    x = conv(self.stem_width or self.widths[0], size, stride, self.dtype, "stem")(image)
    x = BatchNorm(self.bn_groups, self.bn_momentum, dtype=self.dtype, name="stem_norm")(
      x, train=train)
    x = nn.relu(x)
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))           # b h/4 w/4 d
    for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
      block = functools.partial(Block, width, bottleneck=self.bottleneck, zero_init=self.zero_init,
                                bn_groups=self.bn_groups, bn_momentum=self.bn_momentum,
                                dtype=self.dtype)
      x = Stage(depth, 2 if i else 1, block, name=f"stage_{i}")(x, train=train)
    features = x.mean((1, 2), dtype=jnp.float32)                             # b d
    out = {"tokens": rearrange(x, "b h w d -> b (h w) d"), "features": features, "weights": None}
    if not self.num_classes:
      return features, out
    head = nn.Dense(self.num_classes, dtype=jnp.float32, name="head",
                    kernel_init=head_kernel(self.head_init))
    return head(features), out


def make(*, variant: str | int = "50", image_size, channels: int, num_classes: int = 0,
         dtype: Literal["float32", "bfloat16", "float16"] = "float32",
         **fields: ResNet) -> ResNet:
  """A ResNet by `variant` ("50") and any field of `ResNet`, which goes before the variant's.

  Args:
    variant: a key of SIZES, its number of layers.
    image_size, channels: of the data.
    num_classes: of labels, for the head; 0: no head. None: as many as the data has.
    dtype: of computation.

  Raises ValueError on an unknown variant or bad numbers.
  """
  if str(variant) not in SIZES:
    raise ValueError(f"model.variant = {variant!r}: expected one of {', '.join(SIZES)}")
  image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  model = ResNet(image_size=image_size, channels=channels, num_classes=num_classes,
                 dtype=jnp.dtype(dtype), **{**SIZES[str(variant)]._asdict(), **fields})
  for name in ("depths", "widths"):
    sizes = getattr(model, name)
    if not isinstance(sizes, tuple) or not all(type(n) is int and n > 0 for n in sizes):
      raise ValueError(f"model.{name} = {sizes!r}: expected whole numbers above 0, one a stage")
  if not 0 < len(model.depths) == len(model.widths):
    raise ValueError(f"model.depths = {model.depths} and model.widths = {model.widths}: expected "
                     "one of each a stage")
  for name, ok, allowed in (
      ("stem_width", model.stem_width is None or model.stem_width > 0, "at least 1"),
      ("bn_groups", model.bn_groups > 0, "at least 1"),
      ("bn_momentum", 0 <= model.bn_momentum < 1, "a number in [0, 1)")):
    if not ok:
      raise ValueError(f"model.{name} = {getattr(model, name)}: expected {allowed}")
  return model
