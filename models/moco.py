"""The network of Momentum Contrast: any backbone, a projector and, in v3, a predictor."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from models import backbones, vit
from models.batch_norm import BatchNorm

IMAGE_NETWORK = "backbone"  # the part that other runs start from


class Head(nn.Module):
  """Dense layers with ReLU between them: one is MoCo v1's, two are v2's (2003.04297 sec. 2).

  With `batch_norm`, v3's (2104.02057 sec. 4.2.1 and appendix A): a norm after every layer, the
  last without scale and bias, and no biases.
  """

  sizes: tuple[int, ...]  # features after each layer
  batch_norm: bool = False
  last_norm: bool = True
  bn_groups: int = 1
  dtype: jnp.dtype = jnp.float32
  init: str = "lecun"  # a key of vit.PATCH_INITS

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    for i, size in enumerate(self.sizes):
      last = i == len(self.sizes) - 1
      x = nn.Dense(size, use_bias=not self.batch_norm, dtype=self.dtype, name=f"dense_{i}",
                   kernel_init=vit.PATCH_INITS[self.init])(x)
      if self.batch_norm and (self.last_norm or not last):
        x = BatchNorm(groups=self.bn_groups, affine=not last, dtype=self.dtype,
                      name=f"norm_{i}")(x, train=train)
      x = x if last else nn.relu(x)
    return x


class MoCo(nn.Module):
  """`encode` is what the momentum encoder has too; the predictor is the query encoder's alone."""

  backbone: nn.Module
  dim: int  # of queries and keys
  projector_hidden: tuple[int, ...] = ()  # features; () is a linear projector
  predictor_hidden: tuple[int, ...] | None = None  # None: no predictor
  head_norm: bool = False  # batch norm in projector and predictor
  predictor_last_norm: bool = True  # with head_norm: of its output too
  head_kernel_init: Literal[*vit.PATCH_INITS] = "lecun"  # of both
  bn_groups: int = 1  # of all batch norms, backbone and heads
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    def head(hidden, last_norm=True):
      return Head((*hidden, self.dim), self.head_norm, last_norm, self.bn_groups, self.dtype,
                  self.head_kernel_init)
    self.projector = head(self.projector_hidden)
    if self.predictor_hidden is not None:
      self.predictor = head(self.predictor_hidden, self.predictor_last_norm)

  def encode(self, image, *, train: bool = False, return_weights: bool | str = False):
    """image [b, h, w, c] -> (projection [b, dim], the backbone's `out`)."""
    features, out = self.backbone(image, train=train, return_weights=return_weights)
    return self.projector(features, train=train), out

  def __call__(self, image, *, train: bool = False):
    """image [b, h, w, c] -> the prediction (without a predictor: projection) [b, dim]."""
    x, _ = self.encode(image, train=train)
    return x if self.predictor_hidden is None else self.predictor(x, train=train)


def make(*, backbone: Literal[*backbones.BACKBONES] = "resnet", image_size, channels: int,
         variant: str | int = "", dtype: Literal[*vit.DTYPES] = "float32", dim: int = 128,
         bn_groups: int = 1, **fields: (*backbones.NETWORKS, MoCo)) -> MoCo:
  """A MoCo network on `models/BACKBONE.py`, whose own fields it takes too.

  Args:
    backbone: which network.
    image_size, channels, dtype: of the data, and of computation.
    variant: the backbone's, such as "50" or "B/16".
    dim: features of queries and keys.
    bn_groups: over how many groups of a batch batch norm has its statistics, see
      `models.batch_norm.BatchNorm`.

  Raises ValueError on a field that neither has, or a bad size.
  """
  own = {f.name: fields.pop(f.name) for f in dataclasses.fields(MoCo) if f.name in fields}
  sizes = {"dim": (dim,), **{name: own.get(name) or () for name in
                             ("projector_hidden", "predictor_hidden")}}
  for name, values in sizes.items():
    if not isinstance(values, tuple) or not all(type(v) is int and v > 0 for v in values):
      raise ValueError(f"model.{name} = {values!r}: expected whole numbers of features, above 0")
  if bn_groups < 1:
    raise ValueError(f"model.bn_groups = {bn_groups}: expected at least 1")
  if variant:
    fields["variant"] = variant
  if "bn_groups" in backbones.fields_of(backbone):
    fields["bn_groups"] = bn_groups
  network = backbones.make(backbone, image_size=image_size, channels=channels, dtype=dtype,
                           **fields)
  return MoCo(network, dim, bn_groups=bn_groups, dtype=jnp.dtype(dtype), **own)
