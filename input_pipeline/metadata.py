"""`metadata.csv` and `metadata.jsonl` of a folder: file names with labels and captions."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from input_pipeline.records import BadRecord, fault, tell_skipped

METADATA = ("metadata.csv", "metadata.jsonl")


def inside(path: Path, root: Path) -> None:
  if not path.resolve().is_relative_to(root.resolve()):
    raise ValueError(f"{path} leads out of {root}")


def read_metadata(path: Path, root: Path, on_error: str) -> list[dict]:
  """The rows of a metadata file, those of one image gathered; `where` tells the first of them."""
  lines, images, errors = _lines(path), {}, []
  found = {key: None for _, cells in lines if isinstance(cells, dict) for key in cells}
  columns = [key for key in ("file_name", "label", "text") if key in found]
  if found and (len(columns) < 2 or columns[0] != "file_name"):
    raise ValueError(f"{path}, line 1: needs a column 'file_name' and a column 'label' or 'text'; "
                     f"it has: {', '.join(map(str, found))}")
  for number, (line, cells) in enumerate(lines, 1):
    place = f"line {line}, row {number}"
    try:
      _check_cells(cells, columns)
      image = path.parent / str(cells["file_name"])
      inside(image, root)
      if not image.is_file():
        raise BadRecord("missing file", f"no such file {image}")
      file = os.path.relpath(image, root)
      row = images.setdefault(file, {
        "file": file, "where": f"{os.path.relpath(path, root)}, {place}: {cells['file_name']}"})
      if "label" in columns and row.setdefault("label", cells["label"]) != cells["label"]:
        raise BadRecord("unusable label", f"{cells['file_name']!r} has two labels: "
                                          f"{row['label']!r} and {cells['label']!r}")
      if "text" in columns:
        row["text"] = (*row.get("text", ()), str(cells["text"]))
    except BadRecord as e:
      errors.append(BadRecord(e.args[0], f"{path}, {place}: {e}"))
      if on_error == "raise":
        raise errors[0] from e
  tell_skipped(errors, f"the {len(lines)} rows of {path}")
  return list(images.values())


def _lines(path: Path) -> list[tuple[int, Any]]:
  """(number of its last line, cells) of each row of a metadata file."""
  # -sig: spreadsheets write a BOM. What is not UTF-8 becomes lone surrogates, found row by row.
  with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
    if path.suffix == ".csv":
      reader = csv.DictReader(file, strict=True)
      try:
        return [(reader.line_num, cells) for cells in reader]
      except csv.Error as e:
        raise ValueError(f"{path}, from line {reader.line_num + 1} on: not readable as csv: {e}"
                         ) from e
    rows = []
    for number, line in enumerate(file, 1):
      try:
        rows += [(number, json.loads(line))] if line.strip() else []
      except ValueError:
        rows.append((number, line))
    return rows


def _check_cells(cells: Any, columns: Sequence[str]) -> None:
  """Raises BadRecord unless each column of a row holds text or a whole number."""
  if not isinstance(cells, dict):
    raise BadRecord("unreadable row", f"not a JSON object: {str(cells)[:80]!r}")
  if None in cells:
    raise BadRecord("unreadable row", "more cells than columns; quote text that holds commas")
  for key in columns:
    value = cells.get(key)
    if not isinstance(value, str | int):
      raise BadRecord(f"no {key}", f"{key!r} is {value!r}, not text or a whole number")
    if why := fault(str(value)):
      raise BadRecord(f"unusable {key}", f"{key!r} is {value!r}, which is {why}, for file "
                                         f"{cells['file_name']!r}")
