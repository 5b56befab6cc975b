"""Parts of splits, `train[:99%]` as TFDS has it; splits that count classes as another set does."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence

from input_pipeline.folders import composed
from input_pipeline.records import listed, nearest

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


class Renumbered(Sequence):
  """The records of a split with other numbers in the place of their labels."""

  def __init__(self, records: Sequence, numbers: Sequence[int]):
    self.records, self.numbers = records, numbers

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    return self._renumbered(self.records[i])

  def __getitems__(self, indices):
    return [*map(self._renumbered, self.records.__getitems__(indices))]

  def _renumbered(self, record):
    label = record.get("label", -1)
    return record | {"label": self.numbers[label]} if label >= 0 else record  # -1: has none


def with_classes(reader, classes: Sequence[str]):
  """A `batches.Reader` whose labels count the classes as a run does that knows `classes`, by name.

  Raises ValueError where the data has a class without a name, or of a name that is not one of them.
  """
  info = reader.info
  if not info.num_classes or info.class_names == tuple(classes):
    return reader
  said = f"data.source={reader.source!r}: the run knows its {len(classes)} classes by name"
  if not info.class_names:
    raise ValueError(f"{said}, {_some(classes)}; the {info.num_classes} classes here have no names")
  index = {composed(name): i for i, name in enumerate(classes)}
  names = [*map(composed, info.class_names)]
  if unknown := [name for name in names if name not in index]:
    known = classes[:50]
    raise ValueError(f"{said}, and not {_some([*map(repr, unknown)])}; "
                     + nearest(unknown[0], known, listed(known)))
  features = {name: x._replace(classes=len(classes)) if x.kind == "label" else x
              for name, x in info.features.items()}
  reader, numbers = copy.copy(reader), [index[name] for name in names]
  reader.splits = {name: Renumbered(split, numbers) for name, split in reader.splits.items()}
  reader.info = info._replace(num_classes=len(classes), class_names=tuple(classes),
                              features=features)
  return reader


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
