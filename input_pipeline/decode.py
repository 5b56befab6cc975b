"""Encoded images to pixels: all of one, or only what is looked at."""

import contextlib
import io
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from input_pipeline import geometry
from input_pipeline.records import BadRecord

ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
# Its values -> what sets the stored pixels upright; 1 is as stored.
TURNS = {value: getattr(Image.Transpose, name) for value, name in {
  2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
  7: "TRANSVERSE", 8: "ROTATE_90"}.items()}
SIDEWAYS = tuple(TURNS[value] for value in (5, 6, 7, 8))  # which swap height and width
MARKS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))  # where it may be


def decode(record: Mapping[str, Any], channels: int) -> np.ndarray:
  """Decodes a record to uint8 (h, w, c).

  Args:
    record: {"image": encoded bytes or their file, "name": str}.
    channels: 1, 3 or 4; colours are converted, transparency is laid on white. The picture is
      upright, as viewers show it: an orientation that a camera wrote is heeded.

  Raises:
    BadRecord: the record cannot be decoded; names it. Pillow's limit on pixels stays on.
  """
  with opened(record) as image:
    turn = upright(image)
    return _array(_converted(_turned(_jpeg(image, (0, 0)), turn), channels), channels)


def header(record: Mapping[str, Any]) -> tuple[int, int, int]:
  """(h, w, c) of a record's upright image, from its header. Raises as `decode`."""
  with opened(record) as image:
    grey = image.mode in ("1", "L") or "I" in image.mode
    return *_sides(image, upright(image)), 1 if grey else 3


def decode_looks(record: Mapping[str, Any], channels: int, looks: Sequence[geometry.Look],
                 coarse: bool = False) -> list[np.ndarray]:
  """Decodes a record once, for what each look sees of it: uint8 (h, w, c).

  With `coarse`, a JPEG is decoded only as finely as the looks need: at 1/2, 1/4 or 1/8 while each
  box stays at least as large as what it is resized to. Raises as `decode`.
  """
  with opened(record) as image:
    stored, turn = image.size, upright(image)
    full_h, full_w = _sides(image, turn)
    cuts = [look.cut(full_h, full_w) for look in looks]
    drafted = None
    if coarse:
      least = (max(math.ceil(full_w * cut.size[1] / cut.box[3]) for cut in cuts),
               max(math.ceil(full_h * cut.size[0] / cut.box[2]) for cut in cuts))
      drafted = image.draft(None, least[::-1] if turn in SIDEWAYS else least)
    image = _jpeg(image, image.size if image.size != stored else (0, 0))
    image = _converted(_turned(image, turn), channels)
    scale = drafted[1][2] / stored[0] if drafted else 1  # exact; the sides are rounded up
    return [_array(geometry.see(image, cut, look.interpolation, look.exact, scale), channels)
            for cut, look in zip(cuts, looks)]


def upright(image: Image.Image) -> Image.Transpose | None:
  """What sets the pixels of an opened image upright, or None; a broken mark says nothing."""
  if image.format == "TIFF":
    return None  # Pillow turns these itself
  if MARKS.isdisjoint(image.info) and not (image.format == "PNG" and _has_late_exif(image)):
    return None
  try:
    return TURNS.get(image.getexif().get(ORIENTATION))
  except Exception:  # whatever a camera wrote: Pillow's readers of it raise all kinds
    return None


def _has_late_exif(image: Image.Image) -> bool:
  """Whether a PNG has its EXIF behind the pixels, where some programs write it."""
  file, kind = image.fp, b""
  before = file.tell()
  file.seek(8)
  while kind not in (b"eXIf", b"IEND") and len(chunk := file.read(8)) == 8:
    length, kind = struct.unpack(">I4s", chunk)
    file.seek(length + 4, io.SEEK_CUR)
  file.seek(before)
  return kind == b"eXIf"


def _sides(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
  """(height, width) of an image once it is turned."""
  return image.size if turn in SIDEWAYS else image.size[::-1]


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
  return image if turn is None else image.transpose(turn)


def _check_depth(image: Image.Image):
  """Raises ValueError on pixels that have no one way to 8 bits."""
  if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
    kind = "floating-point" if image.mode == "F" else "32-bit or signed"
    raise ValueError(f"its pixels are {kind} numbers, and nothing says which of them is white: "
                     "write it anew with 8 or 16 bits, scaled as is right for what it shows")


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
      _check_depth(image)
      yield image
  except Exception as e:
    raise BadRecord("undecodable image", f"cannot decode the image {record['name']}: {e}") from e
