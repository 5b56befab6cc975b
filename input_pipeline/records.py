"""What a source gives: records, what is known of them, and what is wrong with one."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

log = logging.getLogger("vitrine")

KINDS = ("image", "label", "text", "mask", "boxes", "frames", "depth", "audio", "points", "latent")
SIDES = {"image": 0, "frames": 1, "mask": 0, "depth": 0}  # the first axis of height and width
ALWAYS = ("label", "text")  # small, and of use to evaluations whatever the method needs
HINTS = {"text": "; data.tokenizer makes token ids of it"}  # where batches lack it
VIEWS = ("", "_2")  # what the name of a feature ends with, by view


class Feature(NamedTuple):
  """One named thing that a record holds; `decode` reads each kind, `viewing` moves it."""
  shape: tuple[int | None, ...]  # of one example; None, of an image's sides, where they differ
  dtype: Any
  kind: str  # one of KINDS
  classes: int = 0  # of a label or a mask


class Info(NamedTuple):
  """What a source holds, known before any image is decoded; `describe` makes one of features."""
  image_shape: tuple[int | None, int | None, int] | None  # h w c, None where images differ in them,
  #                                                         of latents the mean's; None: no images
  num_classes: int  # of the labels, else of the masks; 0 = neither
  class_names: tuple[str, ...]
  num_examples: Mapping[str, int]  # by split
  fingerprint: str  # of the content, not of where it lies: the same after a move
  features: Mapping[str, Feature] = {}


def describe(features: Mapping[str, Feature], num_examples: Mapping[str, int], fingerprint: str,
             class_names: Sequence[str] = ()) -> Info:
  """The `Info` of a source that has these features."""
  classes = {feature.kind: feature.classes for feature in features.values() if feature.classes}
  image_shape = features["image"].shape if "image" in features else None
  return Info(image_shape, classes.get("label", classes.get("mask", 0)), tuple(class_names),
              num_examples, fingerprint, features)


class Source(NamedTuple):
  """`splits[name][i]` is a record: {feature: its value, "name": what errors call the record}.

  A value is an array, or what `decode.read` makes one of: of an image, mask or depth encoded bytes
  or their file, of a text a str or a tuple of several, of a label an int."""
  splits: Mapping[str, Sequence]
  info: Info


def image_features(shape: tuple, num_classes: int = 0, kind: str = "image",
                   text: bool = False) -> dict[str, Feature]:
  """The features of images (or latents) h w c and, where there are any, of labels and captions."""
  features = {"image": Feature(shape, "uint8" if kind == "image" else "float32", kind)}
  if num_classes:
    features["label"] = Feature((), "int32", "label", num_classes)
  return features | ({"text": Feature((), "str", "text")} if text else {})


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


class BadRecord(ValueError):
  """BadRecord(kind, message): one that `data.on_error="skip"` passes over, counted by its kind."""

  def __str__(self):
    return self.args[1]


def tell_skipped(errors: Sequence[BadRecord], source: str) -> None:
  """Warns of what was passed over, if anything: how many of each kind, and the first."""
  if errors:
    kinds = Counter(error.args[0] for error in errors)
    log.warning("data.on_error='skip': passed over %d of %s (%s). The first: %s", len(errors),
                source, ", ".join(f"{kind} {n}" for kind, n in kinds.items()), errors[0])


def listed(allowed: Iterable) -> str:
  return f"allowed: {', '.join(map(str, allowed))}"


def nearest(name: Any, allowed: Collection, said: str | None = None) -> str:
  """The end of an error message: the nearest spelling to `name`, if any of `allowed` is near it.

  Before it comes what is `said` of them; None: they are listed where none is near.
  """
  close = get_close_matches(str(name), [*map(str, allowed)], 1)
  if not close:
    return listed(allowed) if said is None else said
  return ("" if said is None else f"{said}; ") + f"did you mean {close[0]!r}?"


def scan(split, limit: int | None = None) -> Iterator[dict]:
  """The records of a split, or a spread of at most `limit`, in order."""
  indices = range(0, len(split), -(-len(split) // limit) if limit else 1)
  for start in range(0, len(indices), 256):
    yield from split.__getitems__(indices[start:start + 256])


def utf8(data: bytes) -> str:
  """A text; what is not UTF-8 is left in it, as lone surrogates, for `fault` to find."""
  return data.decode(errors="surrogateescape")


def fault(caption: str) -> str:
  """What keeps a caption from being used, or "". Bytes that are not UTF-8 are lone surrogates."""
  try:
    caption.encode()
  except UnicodeEncodeError:
    return "not UTF-8"
  return "" if caption.strip() else "empty"


def fingerprint(*content) -> str:
  """Of what can be said in JSON: the same where the same is said."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
