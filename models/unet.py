"""U-Net of residual and attention blocks (2006.11239 appendix B; 2105.05233 sec. 3)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import vit
from models.dit import Condition
from models.transformer import split_by_example


def groups(channels: int) -> int:
  """How many groups `group_norm` makes of them: 32 at most, as published, of four at least."""
  return max(g for g in range(1, 33) if channels % g == 0 and channels >= 4 * g or g == 1)


def group_norm(x, name: str, dtype):
  return nn.GroupNorm(groups(x.shape[-1]), use_fast_variance=False, dtype=dtype, name=name)(x)


def conv(features: int, name: str, dtype, **kwargs):
  """3x3, Xavier. Strided ones pad at the end, as TensorFlow's "SAME" in the published code."""
  return nn.Conv(features, (3, 3), dtype=dtype, name=name,
                 **{"kernel_init": nn.initializers.xavier_uniform(), **kwargs})


class ResidualBlock(nn.Module):
  """Two convolutions, told time and label between them: the shortcut alone at first."""

  features: int
  scale_shift: bool = False  # AdaGN (2105.05233 sec. 3.1), else the condition is added
  dropout: float = 0.0  # rate, [0, 1)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, c, *, train: bool = False):
    """x [b, h, w, c], c [b, d] the condition after SiLU -> [b, h, w, features]."""
    h = conv(self.features, "conv_1", self.dtype)(nn.silu(group_norm(x, "norm_1", self.dtype)))
    c = nn.Dense(self.features * (2 if self.scale_shift else 1), dtype=self.dtype,
                 kernel_init=nn.initializers.xavier_uniform(), name="condition")(c)[:, None, None]
    if self.scale_shift:
      scale, shift = jnp.split(c, 2, axis=-1)                                # b 1 1 features
      h = group_norm(h, "norm_2", self.dtype) * (1 + scale) + shift
    else:
      h = group_norm(h + c, "norm_2", self.dtype)
    h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not train)
    h = conv(self.features, "conv_2", self.dtype, kernel_init=nn.initializers.zeros)(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype,
                   name="shortcut")(x)
    return x + h


class SpatialAttention(nn.Module):
  """Residual self-attention over all pixels: the identity at first."""

  head_width: int | None  # features; None: one head
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    heads = c // (self.head_width or c)
    y = group_norm(x, "norm", self.dtype).reshape(b, h * w, c)               # b n c
    qkv = nn.DenseGeneral((3, heads, c // heads), kernel_init=nn.initializers.xavier_uniform(),
                          dtype=self.dtype, name="qkv")(y)                   # b n 3 k c/k
    y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
    y = nn.DenseGeneral(c, axis=(-2, -1), kernel_init=nn.initializers.zeros, dtype=self.dtype,
                        name="out")(y)                                       # b n c
    return x + y.reshape(x.shape)


class UNet(nn.Module):
  """A denoiser with the call of `models.dit.DiT`. The defaults are 2006.11239's for CIFAR-10."""

  image_size: tuple[int, int]  # pixels (h, w)
  channels: int
  num_classes: int = 0  # 0: unconditional, any label is ignored
  learn_sigma: bool = False  # twice the channels out: [prediction | variance] (2102.09672)
  width: int = 128  # channels; level l, at 1/2^l of the resolution, has multipliers[l] as many
  multipliers: tuple[int, ...] = (1, 2, 2, 2)  # of the width, a level each
  blocks: int = 2  # residual blocks of a level on the way down, one more on the way up
  attention_at: tuple[int, ...] = (16,)  # heights (pixels) of the levels that attend
  head_width: int | None = None  # features of an attention head; None: one head, whatever its width
  scale_shift: bool = False  # AdaGN, as in `ResidualBlock`
  dropout: float = 0.0  # rate, [0, 1)
  dtype: jnp.dtype = jnp.float32

  @property
  def heights(self) -> list[int]:
    """Pixels of each level."""
    return [self.image_size[0] >> level for level in range(len(self.multipliers))]

  @nn.compact
  def __call__(self, x, t, label=None, *, train: bool = False):
    """x [b, h, w, c], t [b] (of 1000), label [b] (`num_classes` or None: null) -> [b, h, w, c].

    Twice the channels with `learn_sigma`; float32. A label that has no row gives NaN.
    """
    c = nn.silu(Condition(4 * self.width, self.num_classes, self.width, self.dtype,
                          name="condition")(t, label))                       # b 4width

    def residual(x, level, name):
      return ResidualBlock(self.width * self.multipliers[level], self.scale_shift, self.dropout,
                           self.dtype, name=name)(split_by_example(x), c, train=train)

    def attend(x, name):
      return SpatialAttention(self.head_width, self.dtype, name=name)(x)

    def block(x, level, name):
      x = residual(x, level, name)
      return attend(x, f"{name}_attention") if self.heights[level] in self.attention_at else x

    x = conv(self.width, "stem", self.dtype)(x.astype(self.dtype))
    skips, last = [x], len(self.multipliers) - 1
    for level in range(last + 1):
      for i in range(self.blocks):
        x = block(x, level, f"down_{level}_{i}")
        skips.append(x)
      if level < last:
        x = conv(x.shape[-1], f"down_{level}", self.dtype, strides=2)(x)     # b h/2 w/2 c
        skips.append(x)
    x = residual(x, last, "middle_0")
    x = residual(attend(x, "middle_attention"), last, "middle_1")
    for level in reversed(range(last + 1)):
      for i in range(self.blocks + 1):
        x = block(jnp.concatenate([x, skips.pop()], axis=-1), level, f"up_{level}_{i}")
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)                  # b 2h 2w c
        x = conv(x.shape[-1], f"up_{level}", self.dtype)(x)
    x = nn.silu(group_norm(split_by_example(x), "norm", self.dtype))
    return conv(self.channels * (2 if self.learn_sigma else 1), "out", jnp.float32,
                kernel_init=nn.initializers.zeros)(x)


def make(*, image_size, channels: int, num_classes: int = 0,
         dtype: Literal[*vit.DTYPES] = "float32", **fields: UNet) -> UNet:
  """A U-Net of any fields of `UNet`. Raises ValueError on sizes that do not fit together.

  Args:
    image_size, channels: of the data.
    num_classes: of labels, None: as many as the data has; 0: none are given.
    dtype: of computation.
  """
  image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  model = UNet(image_size=image_size, channels=channels, num_classes=num_classes,
               dtype=jnp.dtype(dtype), **fields)
  halvings = len(model.multipliers) - 1
  if any(side % 2**halvings for side in image_size):
    raise ValueError(f"model.multipliers = {model.multipliers} halve the image {halvings} times, "
                     f"which {image_size[0]}x{image_size[1]} does not allow: give fewer, or set "
                     f"augment.image_size to a multiple of {2**halvings}")
  if unknown := set(model.attention_at) - set(model.heights):
    raise ValueError(f"model.attention_at = {model.attention_at}: no level is {min(unknown)} "
                     f"pixels high; they are {', '.join(map(str, model.heights))}")
  for height, multiplier in zip(model.heights, model.multipliers):
    attends = height in model.attention_at or height == model.heights[-1]
    if model.head_width and attends and model.width * multiplier % model.head_width:
      raise ValueError(f"model.head_width = {model.head_width} does not divide the "
                       f"{model.width * multiplier} channels at {height} pixels")
  return model
