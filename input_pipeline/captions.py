"""Captions of records, as texts and as token ids."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from input_pipeline import records


def scan(split, limit: int | None = None) -> Iterator[dict]:
  """The records of a split, or a spread of at most `limit`, in order."""
  indices = range(0, len(split), -(-len(split) // limit) if limit else 1)
  for start in range(0, len(indices), 256):
    yield from split.__getitems__(indices[start:start + 256])


def read_captions(split, on_error: str, limit: int | None = None) -> Iterator[tuple[str, ...]]:
  """The captions of each record of a `scan`; none of a bad one that is skipped."""
  for record in scan(split, limit):
    try:
      yield records.captions(record)
    except records.BadRecord:
      if on_error == "raise":
        raise
      yield ()


def most_captions(split) -> int:
  """Of the image that has most. Where one record's text is a string, so is every other's."""
  if not isinstance(split[0].get("text"), tuple):
    return 1
  return max(len(record["text"]) for record in scan(split))


def encode_captions(tokens: Any, captions: list[tuple[str, ...]],
                    most: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(token ids (n, m, l), captions (n,)) of n images, m at least `most`; the rest is padding."""
  count = np.array([len(texts) for texts in captions], np.int32)
  most = max(most, count.max())
  ids = np.full((len(captions), most, tokens.context), tokens.pad_id, np.int32)
  ids[np.arange(most) < count[:, None]] = tokens.encode([*itertools.chain.from_iterable(captions)])
  return ids, count
