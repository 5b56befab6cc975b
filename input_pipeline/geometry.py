"""What of an image is seen, and at which size: random crops, and the cut that evaluation makes.

Everything is cut on the host, whether images come from memory, from files or from a notebook, so
that the same settings always give the same pixels: `viewing` makes them. Which box is drawn follows
from the random generator that the caller gives, one for each (seed, position) of a run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from input_pipeline.records import SIDES, Feature, native_size, nearest

FILTERS = {name: (getattr(Image.Resampling, pillow), fast) for name, pillow, fast in (
  ("linear", "BILINEAR", "bilinear"), ("bilinear", "BILINEAR", "bilinear"),
  ("bicubic", "BICUBIC", "catmull_rom"), ("lanczos3", "LANCZOS", "lanczos3"))}
TRAIN_CROPS = ("centre", "random", "squash")


class View(NamedTuple):
  """How one view of an image is cut; fields of `config.augment`. Filters are antialiased.

  In training at most one of crop_area, crop_padding and train_crop is set. Published recipes:
  evaluation's 0.875 is a side resized to 256 and 224 pixels of it (torchvision's references); a
  random square of the resized image is CLIP's (2103.00020 sec. 2.4).
  """
  image_size: int | tuple[int, int] | None = None  # pixels, or (height, width); None is the data's
  crop_area: tuple | None = None  # (low, high) share in (0, 1] of a random resized crop, see `draw`
  crop_ratio: tuple = (3 / 4, 4 / 3)  # (low, high) width / height of that crop
  crop_padding: int | None = None  # pixels: resize to cover, pad by reflection, cut at random
  #                                  (DeiT III's SRC, 2204.07118 sec. 3.3)
  train_crop: str = "centre"  # or, once resized to cover: "random"; "squash" both sides to the size
  eval_crop: float = 1.0  # share in (0, 1] of each side that evaluation keeps of the resized image,
  eval_squash: bool = False  # which just covers image_size / eval_crop, or is squashed to that
  interpolation: str = "bicubic"  # or "linear" (also "bilinear"), "lanczos3"


class Cut(NamedTuple):
  """A box of an image, and what becomes of it."""
  box: tuple[float, float, float, float]  # top, left, height, width in pixels, maybe fractions
  size: tuple[int, int]  # (h, w) that it is resized to
  window: tuple[int, int, int, int, int] | None = None  # then reflected at the edges by the first
  #                                                       number, and cut: top, left, height, width


class Look(NamedTuple):
  """One look at an image: where, and how it is resampled."""
  cut: Callable[[int, int], Cut]  # of its (height, width)
  interpolation: str
  exact: bool = True  # Pillow's own pixels; else within 2 of 255 of them, in 1/4 of the time


def check(section: str, ok: bool, field: str, value: Any, allowed: str, names=()) -> None:
  """Raises ValueError in the config's words unless `ok`."""
  if not ok:
    raise ValueError(f"{section}.{field} = {value!r}: "
                     + nearest(value, names, f"must be {allowed}"))


def is_range(value: Any, high: float = math.inf) -> bool:
  return (isinstance(value, tuple | list) and len(value) == 2 and all(
    isinstance(x, int | float) for x in value) and 0 < value[0] <= value[1] <= high)


def view(section: str, **fields) -> View:
  """A View of checked fields; raises ValueError with SECTION.FIELD for one that does not do."""
  made = View(**fields)
  size = (made.image_size,) * 2 if np.ndim(made.image_size) == 0 else tuple(made.image_size)
  check(section, made.image_size is None or len(size) == 2 and all(
    isinstance(n, int) and n > 0 for n in size), "image_size", made.image_size,
        "an int > 0 or (height, width)")
  check(section, made.crop_area is None or is_range(made.crop_area, 1), "crop_area", made.crop_area,
        "None or (low, high) with 0 < low <= high <= 1")
  check(section, is_range(made.crop_ratio), "crop_ratio", made.crop_ratio,
        "(low, high) with 0 < low <= high")
  check(section, made.crop_padding is None or type(made.crop_padding) is int
        and made.crop_padding >= 0, "crop_padding", made.crop_padding, "None or an int >= 0")
  check(section, made.train_crop in TRAIN_CROPS, "train_crop", made.train_crop,
        f"one of {TRAIN_CROPS}", TRAIN_CROPS)
  check(section, (made.crop_area is not None) + (made.crop_padding is not None)
        + (made.train_crop != "centre") < 2, "crop_area", made.crop_area,
        "alone: only one of crop_area, crop_padding, train_crop may be set")
  check(section, isinstance(made.eval_crop, int | float) and 0 < made.eval_crop <= 1, "eval_crop",
        made.eval_crop, "a share in (0, 1]")
  check(section, isinstance(made.eval_squash, bool), "eval_squash", made.eval_squash,
        "True or False")
  check(section, made.interpolation in FILTERS, "interpolation", made.interpolation,
        f"one of {tuple(FILTERS)}", FILTERS)
  return made._replace(image_size=None if made.image_size is None else size)


def views(augment: Mapping) -> tuple[View, ...]:
  """The views that a config's section "augment" speaks of: one, or two with a second_view."""
  first = {name: augment[name] for name in View._fields if augment.get(name) is not None}
  made, second = (view("augment", **first),), augment.get("second_view")
  if second is None or not hasattr(second, "keys"):  # which `augment.make` refuses
    return made
  other = {name: second[name] for name in View._fields if name in second}
  return *made, view("augment.second_view", **first | other)


def at_native_size(views: Sequence[View], features: Mapping[str, Feature],
                   source: str) -> list[View]:
  """The views, with the images' own size where they say none. Raises ValueError."""
  is_latent = any(feature.kind == "latent" for feature in features.values())
  if not is_latent and not any(feature.kind in SIDES for feature in features.values()):
    return [*views]
  native = features["image"].shape[:2] if is_latent else native_size(features)
  if native is None and any(view.image_size is None for view in views):
    raise ValueError("augment.image_size=None, but the images are of several sizes: set it")
  views = [view._replace(image_size=view.image_size or native) for view in views]
  if is_latent and (len(views) > 1 or any(
      moves(views[0], *native, is_train) for is_train in (True, False))):
    raise ValueError(f"augment: the latents of {source!r} are {native[0]}x{native[1]} and are not "
                     "cropped or resized: set no other image_size, no crop_area, no second_view")
  return views


# --- Boxes ----------------------------------------------------------------------------------------

def covering(height: int, width: int, least: tuple[int, int]) -> tuple[int, int]:
  """The size, of the image's ratio, that just covers `least`; as torchvision rounds: down."""
  if least[0] * width >= least[1] * height:
    return least[0], max(least[1], width * least[0] // height)
  return max(least[0], height * least[1] // width), least[1]


def within(height: int, width: int, resized: tuple[int, int], top: int, left: int,
           size: tuple[int, int]) -> Cut:
  """Of the image `resized`, `size` pixels from (top, left) on: one resampling gives just those."""
  h, w = resized
  return Cut((top * height / h, left * width / w, size[0] * height / h, size[1] * width / w), size)


def for_evaluation(view: View, height: int, width: int) -> Cut:
  """The centre of the image resized to cover, or squashed to, image_size / eval_crop."""
  size = view.image_size
  resized = tuple(math.floor(n / view.eval_crop + 1e-6) for n in size)
  if not view.eval_squash:
    resized = covering(height, width, resized)
  top, left = (round((r - n) / 2) for r, n in zip(resized, size))
  return within(height, width, resized, top, left, size)


def draw(rng: np.random.Generator, area: tuple[float, float], ratio: tuple[float, float],
         height: int, width: int) -> tuple[int, int, int, int]:
  """A random crop (top, left, height, width), as in torchvision's RandomResizedCrop.

  Up to ten draws of a share of the image's area, uniform in `area`, and of an aspect ratio w/h,
  log-uniform in `ratio`; the first that fits is placed uniformly. If none does, the largest centre
  crop whose ratio is allowed.
  """
  for _ in range(10):
    target = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(*np.log(ratio)))
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def for_training(view: View, rng: np.random.Generator, height: int, width: int) -> Cut:
  """What training sees of an image of this size."""
  size = view.image_size
  if view.crop_area is not None:
    return Cut(draw(rng, view.crop_area, view.crop_ratio, height, width), size)
  if view.train_crop == "squash" or view.train_crop == "centre" and view.crop_padding is None:
    return for_evaluation(view._replace(
      eval_crop=1.0, eval_squash=view.train_crop == "squash"), height, width)
  resized, padding = covering(height, width, size), view.crop_padding or 0
  corner = [int(rng.integers(r + 2 * padding - n + 1)) for r, n in zip(resized, size)]
  if not padding:
    return within(height, width, resized, *corner, size)
  return Cut((0, 0, height, width), resized, (padding, *corner, *size))


def moves(view: View, height: int, width: int, is_train: bool) -> bool:
  """Whether anything but the whole image, as it is, may be seen of one of this size."""
  whole = Cut((0, 0, height, width), (height, width))
  if not is_train:
    return for_evaluation(view, height, width) != whole
  drawn = view.crop_area is not None or bool(view.crop_padding)
  return drawn or for_training(view, np.random.default_rng(0), height, width) != whole
