"""Records to arrays: encoded images to pixels, and whatever else a record holds, whole."""

import contextlib
import io
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from input_pipeline.records import BadRecord, Feature

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name by number of channels
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
    return pixels(converted(turned(jpeg(image, (0, 0)), turn), channels), channels)


def header(record: Mapping[str, Any]) -> tuple[int, int, int]:
  """(h, w, c) of a record's upright image, from its header. Raises as `decode`."""
  with opened(record) as image:
    grey = image.mode in ("1", "L") or "I" in image.mode
    return *sides(image, upright(image)), 1 if grey else 3


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


def sides(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
  """(height, width) of an image once it is turned."""
  return image.size if turn in SIDEWAYS else image.size[::-1]


def turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
  """The image set upright by what `upright` found."""
  return image if turn is None else image.transpose(turn)


def _check_depth(image: Image.Image):
  """Raises ValueError on pixels that have no one way to 8 bits."""
  if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
    kind = "floating-point" if image.mode == "F" else "32-bit or signed"
    raise ValueError(f"its pixels are {kind} numbers, and nothing says which of them is white: "
                     "write it anew with 8 or 16 bits, scaled as is right for what it shows")


def converted(image: Image.Image, channels: int) -> Image.Image:
  """The image in 8 bits and that many channels, transparency laid on white where they are not 4."""
  if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if channels < 4 and image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  mode = MODES[channels]
  return image if image.mode == mode else image.convert(mode)


def pixels(image: Any, channels: int) -> np.ndarray:
  """An image's pixels, uint8 (h, w, c)."""
  array = np.asarray(image)
  return array.reshape(*array.shape[:2], channels)


def jpeg(image: Image.Image, least: tuple[int, int]) -> Image.Image:
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


# --- Features -------------------------------------------------------------------------------------

def read(record: Mapping[str, Any], features: Mapping[str, Feature]) -> dict[str, np.ndarray]:
  """A record's features but texts and latents, as whole arrays.

  Raises BadRecord, which names the record, where one cannot be read or is not as declared.
  """
  return {name: whole(record, name, feature) for name, feature in features.items()}


def whole(record: Mapping[str, Any], name: str, feature: Feature) -> np.ndarray:
  """One feature of a record; raises as `read`."""
  if name not in record:
    raise BadRecord(f"no {name}", f"{record['name']} has no {name!r}, which its source declares")
  value = record[name]
  if feature.kind == "image" and not isinstance(value, np.ndarray):
    return decode(record | {"image": value}, feature.shape[2])
  try:
    array = _value(value, feature)
  except Exception as e:
    raise BadRecord(f"unreadable {feature.kind}", f"cannot read the {name} of {record['name']}: {e}"
                    ) from e
  wanted = feature.shape
  if len(array.shape) != len(wanted) or any(
      n not in (None, m) for n, m in zip(wanted, array.shape)):
    raise BadRecord(f"unreadable {feature.kind}", f"the {name} of {record['name']} is "
                    f"{array.shape}, where the source says {wanted}")
  return array


def _value(value: Any, feature: Feature) -> np.ndarray:
  """A value as an array: of an encoded image the numbers that it stores, of a file its array."""
  if isinstance(value, str | os.PathLike) and str(value).endswith(".npy"):
    value = np.load(value, allow_pickle=False)
  elif isinstance(value, bytes | str | os.PathLike):
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
      value = np.asarray(image)
  array = np.asarray(value).astype(feature.dtype)
  if feature.kind in ("boxes", "points", "label") and feature.shape and feature.shape[0]:
    array = array.reshape(-1, *feature.shape[1:])
    missing = feature.shape[0] - len(array)
    if missing < 0:
      raise ValueError(f"{len(array)} rows, where the source says {feature.shape[0]} at most")
    array = np.concatenate([array, np.full((missing, *feature.shape[1:]), -1, feature.dtype)])
  return array
