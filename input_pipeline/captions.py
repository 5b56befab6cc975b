"""Captions of records, as texts and as token ids."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from input_pipeline import order, records


def read_captions(split, on_error: str, limit: int | None = None) -> Iterator[tuple[str, ...]]:
  """The captions of each record of a `records.scan`; none of a bad one that is skipped."""
  for record in records.scan(split, limit):
    try:
      yield records.captions(record)
    except records.BadRecord:
      if on_error == "raise":
        raise
      yield ()


def make_tokenizer(split, options):
  """The `text.Tokenizer` that `options`, a `reader.Options`, ask for, or None."""
  if options.tokenizer is None:
    return None
  from input_pipeline import text
  said = {name: getattr(options, name) for name in (
    "context", "vocab_size", "lower_case", "eos_id", "pad_id", "mask_token")}
  return text.make(options.tokenizer, itertools.chain.from_iterable(
    read_captions(split, options.on_error, 100_000)), **said)


def find_favourites(split, options) -> np.ndarray | None:
  """The numbers of the examples that `options.favour` asks for; None where it says nothing."""
  if options.favour is None:
    return None
  return order.find_favourites(read_captions(split, options.on_error), options.favour,
                               options.favour_share)


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
