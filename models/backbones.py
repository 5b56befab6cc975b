"""Image networks by name, for methods that take any of them."""

import difflib
from types import ModuleType

from models import resnet, vit

BACKBONES: dict[str, ModuleType] = {"vit": vit, "resnet": resnet}
CHOICES = {"backbone": BACKBONES, **vit.CHOICES, **resnet.CHOICES}
FIELDS = {**vit.FIELDS, **resnet.FIELDS, "variant": str | int}


def make(backbone: str, *, image_size, channels: int, num_classes: int = 0, dtype="float32",
         **fields):
  """A network `(image, *, train) -> (pooled [b, d], out)` of `models/BACKBONE.py`.

  Raises ValueError on a field that this backbone does not have.
  """
  module = BACKBONES[backbone]
  unknown = sorted(set(fields) - {*module.FIELDS, "variant"})
  if unknown:
    close = difflib.get_close_matches(unknown[0], module.FIELDS, 1)
    raise ValueError(f"model.{unknown[0]}: a {backbone} has no such field"
                     + (f"; did you mean {close[0]!r}?" if close else ""))
  return module.make(image_size=image_size, channels=channels, num_classes=num_classes,
                     dtype=dtype, **fields)
