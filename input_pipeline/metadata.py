"""`metadata.csv` and `metadata.jsonl` of a folder: file names with labels and captions."""

import codecs
import csv
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from input_pipeline.folders import Tree, composed
from input_pipeline.records import BadRecord, fault, tell_skipped

COLUMNS = ("file_name", "label", "text")
ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # by their first bytes
log = logging.getLogger("vitrine")


def read_metadata(file: str, tree: Tree, on_error: str) -> list[dict]:
  """The rows of a metadata file of a folder, those of one image gathered.

  Each has `file`, as it stands on the disk, and `where`, which tells the first of them.
  """
  path, folder = Path(tree.path(file)), os.path.dirname(file)
  lines, images, errors = _lines(path), {}, []
  columns = _columns(path, lines)
  for number, (line, cells) in enumerate(lines, 1):
    place = f"line {line}, row {number}"
    try:
      _check_cells(cells, columns)
      name = str(cells["file_name"])
      found = _find(name, folder, tree)
      row = images.get(found)
      if row is None:
        row = images[found] = {"file": found, "where": f"{file}, {place}: {name}"}
      if "label" in columns and composed(str(row.setdefault("label", cells["label"]))) != composed(
          str(cells["label"])):
        raise BadRecord("unusable label", f"{name!r} has two labels: "
                                          f"{row['label']!r} and {cells['label']!r}")
      if "text" in columns:
        row.setdefault("text", []).append(str(cells["text"]))
    except BadRecord as e:
      errors.append(BadRecord(e.args[0], f"{path}, {place}: {e}"))
      if on_error == "raise":
        raise errors[0] from e
  tell_skipped(errors, f"the {len(lines)} rows of {path}")
  return [row | {"text": tuple(row["text"])} if "text" in row else row for row in images.values()]


def _find(name: str, folder: str, tree: Tree) -> str:
  """The file that a row of a metadata file in `folder` names. Raises BadRecord or ValueError."""
  file = (os.path.relpath(name, tree.root) if os.path.isabs(name)
          else os.path.normpath(os.path.join(folder, name)))
  if file == os.pardir or file.startswith(os.pardir + os.sep):
    raise ValueError(f"{tree.path(os.path.join(folder, name))} leads out of {tree.root}: the "
                     "images of a metadata file lie below it")
  found = tree.find(file)
  if found is None:
    raise BadRecord("missing file", f"no such file {tree.path(os.path.join(folder, name))}" + (
      r"; folders are separated by '/', not by '\'" if "\\" in name else ""))
  return found


def _columns(path: Path, lines: Sequence[tuple[int, Any]]) -> list[str]:
  """Those of COLUMNS that a metadata file has. Raises ValueError where these are not enough."""
  found = {key: None for _, cells in lines if isinstance(cells, Mapping) for key in cells}
  columns = [key for key in COLUMNS if key in found]
  near = {str(key): key.strip(" \t\ufeff").lower() for key in found
          if isinstance(key, str) and key not in COLUMNS}
  near = [f"{key!r} is not {wanted!r}" for key, wanted in near.items()
          if wanted in COLUMNS and wanted not in found]
  if not found or len(columns) > 1 and columns[0] == "file_name":
    if near:
      log.warning("%s, line 1: %s, and is not read", path, "; ".join(near))
    return columns
  split = [(key, mark) for key in found if isinstance(key, str) for mark in ";\t|"
           if len(found) == 1 and any(name in key.split(mark) for name in COLUMNS)]
  hint = "".join(f". Separated by {mark!r}? Columns are separated by commas"
                 for _, mark in split[:1]) or "".join(
    f". {'; '.join(near)}: names have no spaces and no capitals" if near else "")
  raise ValueError(f"{path}, line 1: needs a column 'file_name' and a column 'label' or 'text'; "
                   f"it has: {', '.join(map(repr, found))}{hint}")


def _check_encoding(path: Path):
  """Raises ValueError where the first bytes are those of another encoding than UTF-8."""
  with path.open("rb") as file:
    first = file.read(64)
  name = ENCODINGS.get(first[:2]) or ("UTF-16 or UTF-32" if b"\0" in first else None)
  if name:
    raise ValueError(f"{path}: not UTF-8 ({name} by its first bytes, {first[:4]!r}): write it in "
                     "UTF-8")


def _lines(path: Path) -> list[tuple[int, Any]]:
  """(number of its last line, cells) of each row of a metadata file."""
  _check_encoding(path)
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
