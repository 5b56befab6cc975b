"""The kinds of features: how each is read from a record, and how it moves with what is seen of it.

What stands at the pixels of an image moves as the image does: of a mask or depth the nearest pixel
is taken, boxes and points are placed anew. A place is (y, x) in pixels, a box (top, left, bottom,
right); a row of -1 is none, and what a look does not show becomes one.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline import geometry
from input_pipeline.decode import decode, decode_looks
from input_pipeline.records import BadRecord, Feature

SIDES = {"image": 0, "frames": 1, "mask": 0, "depth": 0}  # the first axis of height and width
ALWAYS = ("label", "text")  # small, and of use to evaluations whatever the method needs
HINTS = {"text": "; data.tokenizer makes token ids of it"}  # where batches lack it
VIEWS = ("", "_2")  # what the name of a feature ends with, by view


def is_moved(feature: Feature) -> bool:
  """Whether geometry moves it: points of three coordinates are a cloud, which no image shows."""
  return feature.kind in (*SIDES, "boxes") or feature.kind == "points" and feature.shape[-1] == 2


def native_size(features: Mapping[str, Feature]) -> tuple[int, int] | None:
  """(height, width) of what geometry moves; None where they differ, or where there is nothing."""
  sizes = {feature.shape[SIDES[feature.kind]:][:2] for feature in features.values()
           if feature.kind in SIDES}
  size = sizes.pop() if len(sizes) == 1 else (None, None)
  return None if None in size else size


def at_size(feature: Feature, size: Sequence[int] | None) -> tuple[int, ...]:
  """The shape of one example that is seen at a size."""
  if feature.kind not in SIDES or size is None:
    return feature.shape
  first = SIDES[feature.kind]
  return (*feature.shape[:first], *size, *feature.shape[first + 2:])


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


def read(record: Mapping[str, Any], features: Mapping[str, Feature],
         looks: Iterable[geometry.Look] = (), coarse: bool = False) -> dict[str, np.ndarray]:
  """A record's features but texts and latents, as arrays: whole, or what each look sees of them.

  Raises BadRecord, which names the record, where one cannot be read or is not as declared.
  """
  looks, arrays, seen = once(looks), {}, {}
  for name, feature in features.items():
    if name not in record:
      raise BadRecord(f"no {name}", f"{record['name']} has no {name!r}, which its source declares")
    value = record[name]
    if looks and feature.kind == "image" and not isinstance(value, np.ndarray):
      shown = decode_looks(record | {"image": value}, feature.shape[2], looks, coarse)
      seen |= {name + view: image for view, image in zip(VIEWS, shown)}
    else:
      arrays[name] = _whole(record, name, feature)
  try:
    return seen | see(arrays, features, looks)
  except BadRecord as e:
    raise BadRecord(e.args[0], f"{record['name']}: {e}") from e


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


def _seen(array: np.ndarray, kind: str, look: geometry.Look) -> np.ndarray:
  if kind == "image":
    return geometry.see_array(array, look)
  if kind == "frames":
    return np.stack([geometry.see_array(frame, look) for frame in array])
  if kind in SIDES:
    return geometry.sample(array, look.cut(*array.shape[:2]))
  cut = look.cut.made
  if cut is None:
    return array
  size = cut.window[3:] if cut.window else cut.size
  placed = geometry.place(array.reshape(*array.shape[:-1], -1, 2), cut).reshape(array.shape)
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


# --- Values ---------------------------------------------------------------------------------------

def _whole(record: Mapping[str, Any], name: str, feature: Feature) -> np.ndarray:
  value = record[name]
  if feature.kind == "image" and not isinstance(value, np.ndarray):
    return decode(record | {"image": value}, feature.shape[2])
  try:
    array = _array(value, feature)
  except Exception as e:
    raise BadRecord(f"unreadable {feature.kind}", f"cannot read the {name} of {record['name']}: {e}"
                    ) from e
  wanted = feature.shape
  if len(array.shape) != len(wanted) or any(
      n not in (None, m) for n, m in zip(wanted, array.shape)):
    raise BadRecord(f"unreadable {feature.kind}", f"the {name} of {record['name']} is "
                    f"{array.shape}, where the source says {wanted}")
  return array


def _array(value: Any, feature: Feature) -> np.ndarray:
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
