"""What a source gives: records, what is known of them, and what is wrong with one."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

log = logging.getLogger("vitrine")


class Info(NamedTuple):
  """What a source holds, known before any image is decoded."""
  image_shape: tuple[int | None, int | None, int]  # h w c; None where the images differ
  num_classes: int  # 0 = no labels
  class_names: tuple[str, ...]
  num_examples: dict[str, int]  # by split
  fingerprint: str  # of the content, not of where it lies: the same after a move


class Source(NamedTuple):
  """`splits[name][i]` is {"image": encoded bytes or their file, "name": str} and, where the data
  has them, "label": int and "text": str, or a tuple of captions where images have several. Of
  latents "image" is the array or its file; of texts alone it is None."""
  splits: Mapping[str, Sequence]
  info: Info


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


def nearest(name: str, allowed: Sequence[str]) -> str:
  """The end of an error message: what is allowed, and the nearest spelling to `name`."""
  close = get_close_matches(name, allowed, 1)
  return f"allowed: {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")


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


def captions(record: Mapping[str, Any]) -> tuple[str, ...]:
  """The captions of a record. Raises BadRecord if there are none, or one is empty or not UTF-8."""
  found = (record["text"],) if isinstance(record["text"], str) else record["text"]
  for caption in found or ("",):
    if why := fault(caption):
      raise BadRecord("unusable text", f"{record['name']}: a caption is {why}: {caption!r}")
  return found


def fingerprint(*content) -> str:
  """Of what can be said in JSON: the same where the same is said."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
