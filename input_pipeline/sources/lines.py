"""Texts alone: a file in UTF-8, a text a line."""

import codecs
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from input_pipeline.records import (
  BadRecord,
  Feature,
  Source,
  describe,
  fault,
  fingerprint,
  tell_skipped,
  utf8,
)

NEEDS_REST = True


class _TextLines(Sequence):
  """Random access to lines of a text file, of which only their places are held in memory."""

  def __init__(self, path: Path, places: np.ndarray):
    self.path, self.places = path, places  # int [n, 3]: number, first byte, length

  def __len__(self):
    return len(self.places)

  def __getitem__(self, i):
    return self.__getitems__([i])[0]

  def __getitems__(self, indices):
    with self.path.open("rb") as file:
      return [self._record(file, *self.places[int(i)].tolist()) for i in indices]

  def _record(self, file, number, start, length):
    file.seek(start)
    return {"name": f"{self.path}, line {number}", "text": utf8(file.read(length)).strip()}


def open_source(rest: str, *, on_error: str = "raise", held_out: float | None = None) -> Source:
  """Opens a text file in UTF-8, a text a line; lines that are empty are passed over.

  A line is of the split "test" or "train" by what it says, so that no text is in both.
  """
  path, held_out = Path(rest).expanduser(), 0.05 if held_out is None else held_out
  if not 0 < held_out < 1:
    raise ValueError(f"data.held_out={held_out}: expected a number in (0, 1)")
  if not path.is_file():
    raise FileNotFoundError(f"data.source='lines:{path}': no such file")
  places, errors, start, content = {"train": [], "test": []}, [], 0, hashlib.sha256()
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      said = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
      why = fault(utf8(said))
      if why == "not UTF-8":
        errors.append(BadRecord("unusable text", f"{path}, line {number} is not UTF-8: {said!r}"))
        if on_error == "raise":
          raise errors[0]
      elif not why:
        content.update(said + b"\n")
        split = "test" if zlib.crc32(said) < held_out * 2**32 else "train"
        places[split].append((number, start + line.index(said), len(said)))
      start += len(line)
  tell_skipped(errors, f"the lines of {path}")
  for split, rows in places.items():
    if not rows:
      raise ValueError(f"data.source='lines:{path}': no texts for the split {split!r}; with "
                       f"data.held_out={held_out} there are "
                       f"{sum(map(len, places.values()))} in all")
  return Source({split: _TextLines(path, np.array(rows)) for split, rows in places.items()},
                describe({"text": Feature((), "str", "text")},
                         {split: len(rows) for split, rows in places.items()},
                         fingerprint("lines", content.hexdigest(), held_out)))
