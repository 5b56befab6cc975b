"""Captions of records, as texts and as token ids; which one training shows, and of which image."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from input_pipeline import order, records


def captions_of(record: Mapping[str, Any]) -> tuple[str, ...]:
  """The captions of a record. Raises BadRecord if there are none, or one is empty or not UTF-8."""
  found = (record["text"],) if isinstance(record["text"], str) else record["text"]
  for caption in found or ("",):
    if why := records.fault(caption):
      raise records.BadRecord("unusable text", f"{record['name']}: a caption is {why}: {caption!r}")
  return found


def read_captions(split, on_error: str, limit: int | None = None) -> Iterator[tuple[str, ...]]:
  """The captions of each record of a `records.scan`; none of a bad one that is skipped."""
  for record in records.scan(split, limit):
    try:
      yield captions_of(record)
    except records.BadRecord:
      if on_error == "raise":
        raise
      yield ()


def make_tokenizer(split, options):
  """The `text.Tokenizer` that `options`, a `batches.Options`, ask for, or None."""
  if options.tokenizer is None:
    return None
  from input_pipeline import text
  said = {name: getattr(options, name) for name in (
    "context", "vocab_size", "lower_case", "eos_id", "pad_id", "mask_token")}
  return text.make(options.tokenizer, itertools.chain.from_iterable(
    read_captions(split, options.on_error, 100_000)), **said)


def find_favourites(split, options) -> np.ndarray | None:
  """The numbers of the examples with a caption that `options.favour` matches from its start.

  None where it says nothing.
  """
  pattern, share = options.favour, options.favour_share
  if pattern is None:
    return None
  if not 0 < share < 1:
    raise ValueError(f"data.favour_share={share}: expected a number in (0, 1)")
  try:
    matches = re.compile(pattern).match
  except re.error as e:
    raise ValueError(f"data.favour={pattern!r} is not a regular expression: {e}") from e
  found = np.flatnonzero([any(map(matches, texts))
                          for texts in read_captions(split, options.on_error)])
  if not len(found):
    raise ValueError(f"data.favour={pattern!r} matches no caption from its start")
  return found


def derangement(n: int, seed: int) -> np.ndarray:
  """Another one of n for each of n, all different: the next one on a random round."""
  places = order.generator(seed, order.PERMUTE, 0).permutation(n)
  result = np.empty(n, int)
  result[places] = np.roll(places, 1)
  return result


def most_captions(split) -> int:
  """Of the image that has most. Where one record's text is a string, so is every other's."""
  if not isinstance(split[0].get("text"), tuple):
    return 1
  return max(len(record["text"]) for record in records.scan(split))


def encode_captions(tokens: Any, captions: list[tuple[str, ...]],
                    most: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(token ids (n, m, l), captions (n,)) of n images, m at least `most`; the rest is padding."""
  count = np.array([len(texts) for texts in captions], np.int32)
  most = max(most, count.max())
  ids = np.full((len(captions), most, tokens.context), tokens.pad_id, np.int32)
  ids[np.arange(most) < count[:, None]] = tokens.encode([*itertools.chain.from_iterable(captions)])
  return ids, count


@functools.lru_cache(2)
def _uniform(seed: int, epoch: int, n: int) -> np.ndarray:
  return order.generator(seed, order.CAPTION, epoch).random(n)


def choose(arrays: dict[str, np.ndarray], position: np.ndarray, n: int, seed: int,
           is_train: bool) -> None:
  """Adds to a batch, or an example, of a split of n the text of each image: "text", (..., l).

  In training it is drawn, by the position alone, and the captions are left out; else the first.
  """
  found, count = arrays["captions"], arrays["num_captions"]
  drawn = 0 * count if not is_train else (
    order.entry(_uniform, position, n, seed) * count).astype(int)
  arrays["text"] = np.take_along_axis(found, drawn[..., None, None], -2)[..., 0, :]  # b l
  if is_train:
    del arrays["captions"], arrays["num_captions"]
