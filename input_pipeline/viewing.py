"""What looks see of records: images resampled, and what lies on them moved alike.

What stands at the pixels of an image moves as the image does: of a mask or depth the nearest pixel
is taken, boxes and points are placed anew. A place is (y, x) in pixels, a box (top, left, bottom,
right); a row of -1 is none, and what a look does not show becomes one.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline import decode, geometry
from input_pipeline.records import SIDES, VIEWS, BadRecord, Feature, is_moved, scan

try:
  import cykooz_resizer
except ImportError:  # no wheel for this kind of machine
  cykooz_resizer = None


def read(record: Mapping[str, Any], features: Mapping[str, Feature],
         looks: Iterable[geometry.Look] = (), coarse: bool = False) -> dict[str, np.ndarray]:
  """A record's features but texts and latents, as arrays: whole, or what each look sees of them.

  Raises BadRecord, which names the record, where one cannot be read or is not as declared.
  """
  looks, arrays, seen = once(looks), {}, {}
  for name, feature in features.items():
    encoded = name in record and not isinstance(record[name], np.ndarray)
    if looks and feature.kind == "image" and encoded:
      shown = decode_looks(record | {"image": record[name]}, feature.shape[2], looks, coarse)
      seen |= {name + view: image for view, image in zip(VIEWS, shown)}
    else:
      arrays[name] = decode.whole(record, name, feature)
  try:
    return seen | see(arrays, features, looks)
  except BadRecord as e:
    raise BadRecord(e.args[0], f"{record['name']}: {e}") from e


def decode_looks(record: Mapping[str, Any], channels: int, looks: Sequence[geometry.Look],
                 coarse: bool = False) -> list[np.ndarray]:
  """Decodes a record once, for what each look sees of it: uint8 (h, w, c).

  With `coarse`, a JPEG is decoded only as finely as the looks need: at 1/2, 1/4 or 1/8 while each
  box stays at least as large as what it is resized to. Raises as `decode.decode`.
  """
  with decode.opened(record) as image:
    stored, turn = image.size, decode.upright(image)
    full_h, full_w = decode.sides(image, turn)
    cuts = [look.cut(full_h, full_w) for look in looks]
    drafted = None
    if coarse:
      least = (max(math.ceil(full_w * cut.size[1] / cut.box[3]) for cut in cuts),
               max(math.ceil(full_h * cut.size[0] / cut.box[2]) for cut in cuts))
      drafted = image.draft(None, least[::-1] if turn in decode.SIDEWAYS else least)
    image = decode.jpeg(image, image.size if image.size != stored else (0, 0))
    image = decode.converted(decode.turned(image, turn), channels)
    scale = drafted[1][2] / stored[0] if drafted else 1  # exact; the sides are rounded up
    return [decode.pixels(resampled(image, cut, look.interpolation, look.exact, scale), channels)
            for cut, look in zip(cuts, looks)]


class Once:
  """A look's cut, drawn at its first call: all that a record holds is cut alike."""

  def __init__(self, cut):
    self.cut, self.size, self.made = cut, None, None

  def __call__(self, height: int, width: int) -> geometry.Cut:
    if self.made is None:
      self.size, self.made = (height, width), self.cut(height, width)
    if self.size != (height, width):
      raise BadRecord("sizes differ", f"{height}x{width} pixels beside {self.size[0]}x"
                                      f"{self.size[1]} of the same record")
    return self.made


def once(looks: Iterable[geometry.Look]) -> list[geometry.Look]:
  return [look._replace(cut=Once(look.cut)) for look in looks]


def see(arrays: Mapping[str, np.ndarray], features: Mapping[str, Feature],
        looks: Sequence[geometry.Look]) -> dict[str, np.ndarray]:
  """What each look, which cuts `Once`, sees of an example's whole arrays; other arrays stay."""
  if not looks:
    return dict(arrays)
  result = {name: x for name, x in arrays.items()
            if name not in features or not is_moved(features[name])}
  moved = sorted((name for name in arrays if name not in result),
                 key=lambda name: features[name].kind not in SIDES)
  for view, look in zip(VIEWS, looks):
    for name in moved:  # boxes and points last: they are cut as what has sides was
      result[name + view] = _seen(arrays[name], features[name].kind, look)
  return result


def see_all(batch: dict[str, np.ndarray], features: Mapping[str, Feature],
            looks: Sequence[Sequence[geometry.Look]]) -> dict[str, np.ndarray]:
  """A batch of whole arrays with what is seen of it; `looks` are those of each example."""
  moved = {name for name in features if is_moved(features[name])}

  def rows(part):
    return [see({name: batch[name][i] for name in moved}, features, once(looks[i])) for i in part]

  parts = [range(i, min(i + 8, len(looks))) for i in range(0, len(looks), 8)]
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    seen = [*itertools.chain.from_iterable(pool.map(rows, parts))]
  return batch | {name: np.stack([row[name] for row in seen]) for name in seen[0]}


def typical_side(split: Sequence) -> int:
  """The median shorter side of the images of a split, by a spread of them."""
  sides = []
  for record in scan(split, 64):
    with contextlib.suppress(BadRecord):
      sides.append(min(decode.header(record)[:2]))
  return int(np.median(sides))


def _seen(array: np.ndarray, kind: str, look: geometry.Look) -> np.ndarray:
  if kind == "image":
    return see_array(array, look)
  if kind == "frames":
    return np.stack([see_array(frame, look) for frame in array])
  if kind in SIDES:
    return sample(array, look.cut(*array.shape[:2]))
  cut = look.cut.made
  if cut is None:
    return array
  size = cut.window[3:] if cut.window else cut.size
  placed = place(array.reshape(*array.shape[:-1], -1, 2), cut).reshape(array.shape)
  return shown(array, placed, size)


def shown(rows: np.ndarray, placed: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Placed boxes (..., 4), clipped at the edges, or points (..., 2); -1 where nothing is left."""
  edge = np.float32((*size, *size)[:rows.shape[-1]])
  inside = np.clip(placed, 0, edge)
  if rows.shape[-1] == 4:
    there = (inside[..., 2:] > inside[..., :2]).all(-1)
  else:
    there = (inside == placed).all(-1)
  there &= (rows != -1).any(-1)
  return np.where(there[..., None], inside, np.float32(-1))


# --- Pixels ---------------------------------------------------------------------------------------

def resampled(image: Image.Image, cut: geometry.Cut, interpolation: str, exact: bool = True,
              scale: float = 1.0) -> np.ndarray:
  """The cut of an image, uint8 (h, w) or (h, w, c); `scale` is its size, of that of the box."""
  if cut.box != (0, 0, image.height, image.width) or cut.size != (image.height, image.width):
    image = _resize(image, cut.size, interpolation, exact, *(side * scale for side in cut.box))
  return _window(np.asarray(image), cut)


def _window(array: np.ndarray, cut: geometry.Cut) -> np.ndarray:
  """What is left of (h, w, ...) at the end of a cut: reflected at the edges, and cut to size."""
  if cut.window is None:
    return array
  padding, top, left, height, width = cut.window
  array = np.pad(array, ((padding, padding),) * 2 + ((0, 0),) * (array.ndim - 2), "reflect")
  return array[top:top + height, left:left + width]


def _resize(image, size, interpolation, exact, top, left, height, width):
  pillow, fast = geometry.FILTERS[interpolation]
  if exact or cykooz_resizer is None or image.mode == "RGBA":
    return image.resize(size[::-1], pillow, box=(
      left, top, min(left + width, image.width), min(top + height, image.height)))
  box = cykooz_resizer.CropBox(
    left, top, min(width, image.width - left), min(height, image.height - top))
  how = cykooz_resizer.ResizeAlg.convolution(getattr(cykooz_resizer.FilterType, fast))
  result = Image.new(image.mode, size[::-1])
  cykooz_resizer.Resizer().resize_pil(
    image, result, cykooz_resizer.ResizeOptions(how, crop_box=box))
  return result


def sample(array: np.ndarray, cut: geometry.Cut) -> np.ndarray:
  """The cut of what stands at pixels but is no colour, (h, w, ...): the nearest pixel's value."""
  def places(length, start, side, size):
    at = np.floor(start + (np.arange(size) + 0.5) * side / size).astype(int)
    return np.clip(at, 0, length - 1)

  (h, w), (top, left, height, width) = array.shape[:2], cut.box
  return _window(array[np.ix_(places(h, top, height, cut.size[0]),
                              places(w, left, width, cut.size[1]))], cut)


def place(points: np.ndarray, cut: geometry.Cut) -> np.ndarray:
  """Where (..., 2) places (y, x), in pixels of the image, lie in the cut: in it or beside it."""
  top, left, height, width = cut.box
  placed = (points - np.float32((top, left))) * np.float32((cut.size[0] / height,
                                                            cut.size[1] / width))
  if cut.window is not None:
    padding, top, left, _, _ = cut.window
    placed = placed + np.float32((padding - top, padding - left))
  return placed


def see_array(image: np.ndarray, look: geometry.Look) -> np.ndarray:
  """`resampled` of an image uint8 (h, w, c), of any number of channels."""
  h, w, c = image.shape
  cut = look.cut(h, w)
  if c not in decode.MODES:
    return np.concatenate([see_array(plane, look._replace(cut=lambda h, w: cut))
                           for plane in np.split(image, c, axis=2)], axis=2)
  seen = resampled(Image.fromarray(image[..., 0] if c == 1 else image), cut, look.interpolation,
                   look.exact)
  return seen.reshape(*seen.shape[:2], c)


def evaluation_pixels(view: geometry.View, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
  """What evaluation sees, uint8 (b, h, w, c), of images uint8 (h, w, c), of one size or of several.

  Raises ValueError where they are not uint8, or not images.
  """
  images = [*map(np.asarray, images)] if isinstance(images, list | tuple) else np.asarray(images)
  for image in images:
    if image.dtype != np.uint8 or image.ndim != 3:
      raise ValueError(f"images must be uint8 [h, w, c], not {image.dtype} {list(image.shape)}")
  if isinstance(images, np.ndarray) and not geometry.moves(view, *images.shape[1:3],
                                                           is_train=False):
    return images
  look = geometry.Look(lambda h, w: geometry.for_evaluation(view, h, w), view.interpolation)
  return np.stack([see_array(image, look) for image in images])
