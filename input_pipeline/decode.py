"""Encoded images to pixels: all of one, or only what is looked at."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from input_pipeline import geometry
from input_pipeline.records import BadRecord


def decode(record: Mapping[str, Any], channels: int) -> np.ndarray:
  """Decodes a record to uint8 (h, w, c).

  Args:
    record: {"image": encoded bytes or their file, "name": str}.
    channels: 1, 3 or 4; colours are converted, transparency is laid on white.

  Raises:
    BadRecord: the record cannot be decoded; names it. Pillow's limit on pixels stays on.
  """
  with opened(record) as image:
    return _array(_converted(_jpeg(image, (0, 0)), channels), channels)


def decode_looks(record: Mapping[str, Any], channels: int, looks: Sequence[geometry.Look],
                 coarse: bool = False) -> list[np.ndarray]:
  """Decodes a record once, for what each look sees of it: uint8 (h, w, c).

  With `coarse`, a JPEG is decoded only as finely as the looks need: at 1/2, 1/4 or 1/8 while each
  box stays at least as large as what it is resized to. Raises as `decode`.
  """
  with opened(record) as image:
    full_w, full_h = image.size
    cuts = [look.cut(full_h, full_w) for look in looks]
    drafted = None
    if coarse:
      drafted = image.draft(None, (
        max(math.ceil(full_w * cut.size[1] / cut.box[3]) for cut in cuts),
        max(math.ceil(full_h * cut.size[0] / cut.box[2]) for cut in cuts)))
    image = _jpeg(image, image.size if image.size != (full_w, full_h) else (0, 0))
    image = _converted(image, channels)
    scale = drafted[1][2] / full_w if drafted else 1  # exact; the sides are rounded up
    return [_array(geometry.see(image, cut, look.interpolation, look.exact, scale), channels)
            for cut, look in zip(cuts, looks)]


def _converted(image: Image.Image, channels: int) -> Image.Image:
  if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if channels < 4 and image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  mode = geometry.MODES[channels]
  return image if image.mode == mode else image.convert(mode)


def _array(pixels: Any, channels: int) -> np.ndarray:
  pixels = np.asarray(pixels)
  return pixels.reshape(*pixels.shape[:2], channels)


def _jpeg(image: Image.Image, least: tuple[int, int]) -> Image.Image:
  """Decodes a JPEG in colour, at least as large as `least`: Pillow's pixels, in 2/3 of its time.

  Any other image comes back as it is; so does one with a fault, for Pillow to judge.
  """
  if image.format != "JPEG" or image.mode != "RGB":
    return image
  image.fp.seek(0)
  try:
    return Image.fromarray(simplejpeg.decode_jpeg(
      image.fp.read(), min_width=least[0], min_height=least[1]))
  except ValueError:
    return image


@contextlib.contextmanager
def opened(record: Mapping[str, Any]):
  """A record's image, its header read; whatever goes wrong with it meanwhile is a BadRecord."""
  data = record["image"]
  try:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
      yield image
  except Exception as e:
    raise BadRecord("undecodable image", f"cannot decode the image {record['name']}: {e}") from e
