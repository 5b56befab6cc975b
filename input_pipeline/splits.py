"""Parts of splits: `train[:99%]` names the first 99 of 100 examples of `train`, as TFDS has it."""

import re
from collections.abc import Iterable, Mapping, Sequence

PART = re.compile(r"(\w+)\[(\d+%?)?:(\d+%?)?\]")


class Part(Sequence):
  """Some of the records of a split, in a row; picklable where the split is."""

  def __init__(self, records: Sequence, indices: range):
    self.records, self.indices = records, indices

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, i):
    return self.records[self.indices[i]]

  def __getitems__(self, indices):
    return self.records.__getitems__([self.indices[i] for i in indices])


def _place(text: str, n: int) -> int:
  """`text`, a number or percent, among n examples."""
  return min(round(int(text[:-1]) / 100 * n) if text.endswith("%") else int(text), n)


def with_parts(splits: Mapping[str, Sequence], names: Iterable[str | None]) -> dict[str, Sequence]:
  """`splits` with those of `names` that are parts of one, NAME[FROM:TO] by numbers or percent.

  Percentages are rounded to whole examples. Raises ValueError on a part without examples.
  """
  splits = dict(splits)
  for name in names:
    found = PART.fullmatch(name or "")
    if not found or found[1] not in splits:
      continue
    records = splits[found[1]]
    n = len(records)
    indices = range(_place(found[2] or "0", n), _place(found[3] or "100%", n))
    if not indices:
      raise ValueError(f"split {name!r}: none of the {n} examples of {found[1]!r}")
    splits[name] = Part(records, indices)
  return splits
