"""What stands between an image and the patch embedding of a ViT: nothing, or convolutions.

A stem gives features [b, n, d'] on the grid of patches, row by row, of which a ViT embeds each.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from models import resnet
from models.batch_norm import BatchNorm

# Blocks of ResNet-50's stages up to a stride of the patch; for 16 pixels the last stage's are in
# the one before (2010.11929 sec. 4.1).
STAGES = {4: (3,), 8: (3, 4), 16: (3, 4, 9), 32: (3, 4, 6, 3)}


class ResNetStem(nn.Module):
  """The hybrid's (2010.11929 sec. 3.1): a ResNet-50's features, strided by the patch."""

  width: int
  patch: int  # pixels, a key of STAGES
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, *, train: bool = False):
    """image [b, h, w, c] -> [b, n, d']."""
    depths = STAGES[self.patch]
    network = resnet.ResNet(image.shape[1:3], image.shape[-1], depths, bottleneck=True,
                            widths=resnet.ResNet.widths[:len(depths)], dtype=self.dtype,
                            name="resnet")
    return network(image, train=train)[1]["tokens"]


class EarlyConv(nn.Module):
  """Early convolutions (2106.14881 sec. 3): 3x3 of stride 2, each twice as wide as the one before.

  The last has as many features as the model; their 1x1 convolution is the ViT's embedding.
  """

  width: int  # divisible by half the patch
  patch: int  # pixels, a power of two
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, *, train: bool = False):
    """image [b, h, w, c] -> [b, n, d]."""
    x, layers = image, self.patch.bit_length() - 1
    for i in range(layers):
      x = resnet.conv(self.width >> layers - 1 - i, 3, 2, self.dtype, f"conv_{i}")(x)
      x = nn.relu(BatchNorm(dtype=self.dtype, name=f"norm_{i}")(x, train=train))
    return rearrange(x, "b h w d -> b (h w) d")


# (width, patch, dtype) -> a module of images.
STEMS: Mapping[str, Callable] = {"resnet": ResNetStem, "early_conv": EarlyConv}


def first_filters(params):
  """The filters of a stem's first layer, [d, p, p, c]."""
  first = params["resnet"]["stem"] if "resnet" in params else params["conv_0"]
  return rearrange(first["kernel"], "p q c d -> d p q c")


def check_stem(stem: str, width: int, patch: int):
  """Raises ValueError where a stem cannot be strided by the patch."""
  if stem == "resnet" and patch not in STAGES:
    raise ValueError(f"model.patch = {patch}: with model.patch_stem = 'resnet' one of "
                     + ", ".join(map(str, STAGES)))
  if stem == "early_conv" and (patch < 2 or patch & (patch - 1) or width % (patch // 2)):
    raise ValueError(f"model.patch = {patch}, model.width = {width}: with model.patch_stem = "
                     "'early_conv' the patch is a power of two, and half of it divides the width")
