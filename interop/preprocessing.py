"""What files of published weights say of their images, as fields of config.augment, and back."""

import math
from collections.abc import Mapping

from interop import files, layout

# Pillow's number of a filter, and what timm and open_clip call it -> ours.
FILTERS = {1: "lanczos3", 2: "linear", 3: "bicubic", "lanczos": "lanczos3", "bilinear": "linear",
           "bicubic": "bicubic"}
# What a file may tell beside image_size, and its default in config.augment.
FIELDS = dict(mean=0.5, std=0.5, eval_crop=1.0, eval_squash=False, interpolation="bicubic")
# Hugging Face's old files give one number: the shorter side to these classes, both to others.
SHORTER_SIDE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "ConvNeXT", "Flava")


def told(config: Mapping, preprocessor: Mapping) -> dict:
  """Fields of config.augment, as far as the files tell.

  Args:
    config: config.json; timm's has a section pretrained_cfg, open_clip's preprocess_cfg.
    preprocessor: Hugging Face's preprocessor_config.json; {} if there is none.
  """
  if preprocessor:
    found = _hugging_face(preprocessor)
  elif config.get("pretrained_cfg"):
    found = _timm(config["pretrained_cfg"])
  else:
    found = _open_clip(config.get("preprocess_cfg") or {})
  return {name: tuple(value) if isinstance(value, list) else value
          for name, value in found.items() if value is not None}


def assumed(augment: Mapping, source: files.Source, overrides: Mapping) -> list[layout.Entry]:
  """What was taken for granted of how evaluation sees images, as no file and no user told it."""
  there = told(source.config, source.preprocessor)
  return [layout.Entry("assumed", "", None, note="no file tells it",
                       ours=f"config.augment.{field} = {augment.get(field, plain)!r}")
          for field, plain in FIELDS.items()
          if field not in there and f"augment.{field}" not in overrides]


def _hugging_face(said: Mapping) -> dict:
  """Of the image processors' fields: do_resize to size, do_center_crop to crop_size."""
  name = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
  size, crop = (_named(said.get(key)) for key in ("size", "crop_size"))
  cropped = bool(said.get("do_center_crop", bool(crop)))
  if "side" in size:  # one number: of the shorter side, or of both
    shorter = name.startswith(SHORTER_SIDE) or not name and cropped
    size = dict(shortest_edge=size["side"]) if shorter else _square(size["side"])
  squash, resized = "shortest_edge" not in size, _pair(size)
  pixels = _pair(crop) if crop and cropped else resized
  shares = {want / side for want, side in zip(pixels or (), resized or ())}
  if name.lower().startswith("convnext") and resized:  # image_processing_convnext.py: its own rule
    squash = resized[0] >= 384
    shares = {1.0 if squash else said.get("crop_pct") or 224 / 256}
  # Where the sides have several shares, or nothing is resized, no field of ours says it.
  known = said.get("do_resize", True) and len(shares) == 1 and 0 < min(shares) <= 1
  plain = said.get("do_normalize") is False
  return dict(mean=0.0 if plain else said.get("image_mean"),
              std=1.0 if plain else said.get("image_std"), image_size=pixels,
              eval_crop=min(shares) if known else None, eval_squash=squash if known else None,
              interpolation=FILTERS.get(said.get("resample")))


def _square(side: int) -> dict:
  return dict(height=side, width=side)


def _named(size) -> dict:
  """What Hugging Face calls a size, by names: a number is a "side", a pair (height, width)."""
  if isinstance(size, int):
    return dict(side=size)
  if isinstance(size, list | tuple):
    return dict(zip(("height", "width"), size, strict=True))
  return {name: value for name, value in (size or {}).items() if value is not None}


def _pair(size: Mapping) -> tuple[int, int] | None:
  """(height, width) of a named size."""
  side = size.get("shortest_edge", size.get("side"))
  pair = (side, side) if side else (size.get("height"), size.get("width"))
  return pair if all(pair) else None


def _timm(said: Mapping) -> dict:
  """timm/data/transforms_factory.py: transforms_imagenet_eval, its defaults from data/config.py."""
  mode = said.get("crop_mode") or "center"
  known = mode in ("center", "squash")
  return dict(mean=said.get("mean"), std=said.get("std"),
              image_size=(said.get("input_size") or [])[1:] or None,
              eval_crop=(said.get("crop_pct") or 0.875) if known else None,
              eval_squash=mode == "squash" if known else None,
              interpolation=FILTERS.get(said.get("interpolation") or "bicubic"))


def _open_clip(said: Mapping) -> dict:
  """open_clip/transform.py: PreprocessCfg."""
  size, mode = said.get("size"), said.get("resize_mode", "shortest") if said else None
  return dict(mean=said.get("mean"), std=said.get("std"),
              image_size=(size, size) if isinstance(size, int) else size,
              eval_crop=1.0 if mode in ("shortest", "squash") else None,
              eval_squash=mode == "squash" if mode in ("shortest", "squash") else None,
              interpolation=FILTERS.get(said.get("interpolation", "bicubic")) if said else None)


def _known(augment: Mapping) -> dict:
  return {name: value for name, value in augment.items() if value is not None}


def resized(augment: Mapping) -> tuple[int, int]:
  """(height, width) that evaluation resizes to, or covers, before it cuts the centre."""
  return tuple(math.floor(n / augment.get("eval_crop", 1.0) + 1e-6) for n in augment["image_size"])


def _each(value, channels: int) -> list:
  return list(value) if isinstance(value, (tuple, list)) else [value] * channels


def to_hugging_face(augment: Mapping, channels: int) -> dict:
  """preprocessor_config.json; its class is one that heeds all of it."""
  augment = _known(augment)
  (h, w), (rows, columns) = augment["image_size"], resized(augment)
  squash = augment.get("eval_squash", False)
  cut = not squash or (h, w) != (rows, columns)
  name = "CLIP" if not squash else "DeiT" if cut else "ViT"
  size = dict(height=rows, width=columns) if squash else dict(shortest_edge=min(rows, columns))
  how = augment.get("interpolation", "bicubic")
  number = {ours: number for number, ours in FILTERS.items() if isinstance(number, int)}
  return dict(
    image_processor_type=f"{name}ImageProcessor", do_resize=True, size=size,
    resample=number[FILTERS.get(how, how)],
    **(dict(do_center_crop=True, crop_size=dict(height=h, width=w)) if cut else {}),
    do_rescale=True, do_normalize=True, image_mean=_each(augment.get("mean", 0.5), channels),
    image_std=_each(augment.get("std", 0.5), channels))


def to_timm(augment: Mapping, channels: int) -> dict:
  """pretrained_cfg of timm's config.json."""
  augment = _known(augment)
  how = augment.get("interpolation", "bicubic")
  return dict(input_size=[channels, *augment["image_size"]],
              interpolation={"linear": "bilinear", "lanczos3": "lanczos"}.get(how, how),
              crop_pct=augment.get("eval_crop", 1.0),
              crop_mode="squash" if augment.get("eval_squash") else "center",
              mean=_each(augment.get("mean", 0.5), channels),
              std=_each(augment.get("std", 0.5), channels))
