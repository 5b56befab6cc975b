"""Image networks by name, for methods that take any of them."""

import dataclasses
import difflib
from types import ModuleType
from typing import Literal

from models import resnet, vit

FROM_DATA = ("image_size", "channels", "num_classes", "dtype")  # what `make` is told beside them
BACKBONES: dict[str, ModuleType] = {"vit": vit, "resnet": resnet}
NETWORKS = (vit.ViT, resnet.ResNet)  # whose fields such a method's model has


def fields_of(backbone: str) -> set[str]:
  """What a config may say of a backbone."""
  network = dict(zip(BACKBONES, NETWORKS, strict=True))[backbone]
  return {f.name for f in dataclasses.fields(network)} - {"parent", "name", *FROM_DATA}


def make(backbone: str, *, image_size, channels: int, num_classes: int = 0,
         dtype: Literal[*vit.DTYPES] = "float32", **fields: NETWORKS):
  """A network `(image, *, train) -> (pooled [b, d], out)` of `models/BACKBONE.py`.

  Raises ValueError on a field that this backbone does not have.
  """
  module = BACKBONES[backbone]
  known = fields_of(backbone)
  unknown = sorted(set(fields) - {*known, "variant"})
  if unknown:
    close = difflib.get_close_matches(unknown[0], known, 1)
    raise ValueError(f"model.{unknown[0]}: a {backbone} has no such field"
                     + (f"; did you mean {close[0]!r}?" if close else ""))
  return module.make(image_size=image_size, channels=channels, num_classes=num_classes,
                     dtype=dtype, **fields)
