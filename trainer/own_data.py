"""What a config leaves open for one who brings own data: the size and the number of images."""

import logging
import math

from ml_collections import ConfigDict

from input_pipeline import geometry
from trainer import fields

log = logging.getLogger("vitrine")


def settle_size(config: ConfigDict, native: tuple[int, int]):
  """Images of a size that the model's patch divides, for one who brings own images and says none.

  Their ratio stays, nearly; the shorter side is at most 64 pixels and eight patches, as recipes
  that were made for small images would take long for large ones.
  """
  variant = str(config.model.get("variant") or "")
  patch = config.model.get("patch") or int(variant.partition("/")[2] or 1)
  scale = min(1, min(64, 8 * patch if patch > 1 else 64) / min(native))
  size = tuple(patch * max(1, math.ceil(side * scale / patch - 1e-9)) for side in native)
  if size != native:
    config.augment.image_size = size
    log.warning("own data: images of about %dx%d pixels are seen at augment.image_size = (%d, %d)"
                "%s", *native, *size, f", which patches of {patch} divide" if patch > 1 else "")


def settle(config: ConfigDict, data) -> ConfigDict:
  """A config with the size and number of images that own data has, where it does not say them."""
  config = ConfigDict(config.to_dict())
  if config.data.batch_size != data.batch_size:
    log.warning("own data: data.batch_size = %d in the place of %d, of %d training examples",
                data.batch_size, config.data.batch_size, data.info.num_examples[data.train_split])
    config.data.batch_size = data.batch_size
  module = fields.find_module("models", config.model.name, "config.model.name")
  if data.info.image_shape is not None and config.augment.get("image_size") is None and (
      "image_size" in fields.accepted(module.make)) and not config.data.get("latents"):
    settle_size(config, data.typical_size())
    data.views = geometry.views(config.augment.to_dict())
  return config
