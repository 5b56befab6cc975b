"""A folder of images, or of stored latents: in class sub-folders, flat, or with a metadata file."""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import features as pillow

from input_pipeline import folders
from input_pipeline.decode import header
from input_pipeline.folders import composed
from input_pipeline.metadata import read_metadata
from input_pipeline.records import (
  BadRecord,
  Source,
  describe,
  fingerprint,
  image_features,
  listed,
  nearest,
)

NEEDS_REST = True
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
              *([".avif"] if "avif" in pillow.modules and pillow.check("avif") else []))
# Pictures all the same, of which is told that they are not read.
OTHERS = (".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".jpe", ".svg", ".psd", ".dng",
          ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
ARRAYS = (".npy", ".npz")
log = logging.getLogger("vitrine")


class _Records(list):
  """The records of one split, whose files `decode` reads."""

  def __getitems__(self, indices):
    return [self[int(i)] for i in indices]


def open_source(rest: str, *, on_error: str = "raise", latents: str | None = None,
                follow_links: bool = False, held_out: float | None = None) -> Source:
  """Opens a folder of images.

  Sub-folders `train` and `test`, `val`, `valid`, `dev` or `validation`, in any capitals, are
  splits (`folders.find_splits`); otherwise all is `train`. A split holds class sub-folders
  (searched through), or images only, or a `metadata.csv` / `metadata.jsonl` with the columns
  `file_name` (relative) and `text` and/or `label`; several rows of one file are several captions of
  one image. Class names are sorted, as numbers if all are. Hidden files, droppings of file managers
  and other extensions are passed over; links out of the folder are refused unless `follow_links`.

  With `held_out`, that share of the images of a folder that has `train` alone is the split `test`.
  """
  root = Path(rest).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(f"data.source='folder:{root}': no such folder")
  if held_out is not None and not 0 <= held_out < 1:
    raise ValueError(f"data.held_out={held_out}: expected a number in [0, 1)")
  tree, extensions = folders.Tree(root, follow_links), ARRAYS if latents else EXTENSIONS
  splits = folders.find_splits(tree, extensions)
  passed = Counter()
  rows = {split: _read_split(tree, folder, on_error, extensions, passed)
          for split, folder in splits.items()}
  if passed and not latents:
    log.warning("%s: passed over %s", root, _said(passed))
  classes, known = _number_labels(rows, root), folders.same_as_before(splits)
  if held_out and [*rows] == ["train"]:
    known = rows = hold_out(rows["train"], held_out, root)
  records = {split: _Records(
    {"image": tree.path(row["file"]), "name": tree.path(row.get("where", row["file"]))}
    | {key: row[key] for key in ("label", "text") if key in row} for row in examples)
    for split, examples in rows.items()}
  first = next(iter(records.values()))[0]
  if latents:
    from input_pipeline.latents import latent_shape
  shape = (latent_shape(next(iter(records.values())), latents, on_error) if latents
           else _image_shape(sum(records.values(), []), root, on_error))
  features = image_features(shape, len(classes), "latent" if latents else "image",
                            text="text" in first)
  return Source(records, describe(
    features, {s: len(r) for s, r in rows.items()},
    fingerprint("folder", {split: rows[split] for split in known}), classes))


def _said(passed: Mapping[str, int]) -> str:
  """What is told of pictures that are passed over."""
  counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed.items()))
  return f"{counts}, which are not read: convert them to JPEG or PNG" + (
    "; .avif needs Pillow 11.3 or newer, with libavif" if ".avif" in passed else "")


def _images(tree: folders.Tree, folder: str, extensions: tuple[str, ...],
            passed: Counter) -> Iterator[str]:
  """All images below a folder; `passed` counts other pictures, by extension."""
  for name, is_dir in tree.shown(folder).items():
    path = f"{folder}/{name}" if folder else name
    if is_dir:
      yield from _images(tree, path, extensions, passed)
    elif name.lower().endswith(extensions):
      yield path
    elif (suffix := os.path.splitext(name)[1].lower()) in OTHERS:
      passed[suffix] += 1


def _read_split(tree: folders.Tree, folder: str, on_error: str, extensions: tuple[str, ...],
                passed: Counter) -> list[dict]:
  """One dict an image: file (relative to the root), bytes, and label (a name), text, where if any.
  """
  entries, path = tree.shown(folder), tree.path(folder)
  metadata = [name for name in entries if name in folders.METADATA]
  if metadata:
    if len(metadata) > 1:
      raise ValueError(f"{path} has both {' and '.join(metadata)}: keep one")
    rows = read_metadata(os.path.join(folder, metadata[0]), tree, on_error)
    if not rows:
      raise ValueError(f"{os.path.join(path, metadata[0])} has no row of use: each names an image")
  elif classes := [name for name, is_dir in entries.items() if is_dir]:
    if any(name.lower().endswith(extensions) for name in entries if not entries[name]):
      raise ValueError(f"{path} has images beside sub-folders: which class are they?")
    rows = [{"file": file, "label": name} for name in classes
            for file in _images(tree, os.path.join(folder, name), extensions, passed)]
    if empty := set(classes) - {row["label"] for row in rows}:
      raise ValueError(f"no images in class folder {os.path.join(path, min(empty))}; "
                       f"looked for {' '.join(extensions)}"
                       + (f"; passed over {_said(passed)}" if passed else ""))
  else:
    rows = [{"file": file} for file in _images(tree, folder, extensions, passed)]
  if not rows:
    raise ValueError(f"no images in {path}; looked for {' '.join(extensions)}"
                     + (f"; passed over {_said(passed)}" if passed else ""))
  for row in rows:
    row["bytes"] = os.stat(tree.path(row["file"])).st_size
  return rows


def _number_labels(rows: Mapping[str, Sequence[dict]], root: Path) -> list[str]:
  """Puts numbers in the place of the rows' labels, and returns the names that these stand for.

  A name is the same in NFC and NFD; its place among others is that of its first spelling.
  """
  trained = "train" if "train" in rows else None  # of splits to evaluate on, all count
  spelt = {}
  for row in rows["train"] if trained else sum(rows.values(), []):
    if "label" in row:
      name = str(row["label"])
      spelt[composed(name)] = min(name, spelt.get(composed(name), name))
  numbers = all(map(str.isdecimal, spelt))
  classes = sorted(spelt, key=lambda name: (int(name) if numbers else 0, spelt[name]))
  index = {name: i for i, name in enumerate(classes)}
  for split, examples in rows.items():
    for row in examples:
      if "label" in row:
        label = composed(str(row["label"]))
        if label not in index:
          known = classes[:50]
          raise ValueError(f"{root / row['file']}: label {label!r} of split {split!r} is not a "
                           f"class of 'train'; {nearest(label, known, listed(known))}")
        row["label"] = index[label]
      elif classes:
        raise ValueError(f"{root}: {trained or 'another split'!r} has labels, split {split!r} has "
                         "none")
  return classes


def hold_out(rows: Sequence[dict], share: float, root: Path) -> dict[str, list[dict]]:
  """{"train": rows, "test": about that share of each class}; which, by a hash of their file names.

  At least one image is held out, and each class keeps one to be trained on.
  """
  def place(i):
    return rows[i].get("label", 0), zlib.crc32(composed(rows[i]["file"]).encode(
      errors="surrogateescape")), i

  left, test = Counter(row.get("label", 0) for row in rows), set()
  for k, i in enumerate(sorted(range(len(rows)), key=place)):
    label = rows[i].get("label", 0)
    if left[label] > 1 and int((k + 1) * share + 0.5) > len(test):
      test.add(i)
      left[label] -= 1
  if not test and (i := next((i for i, row in enumerate(rows) if left[row.get("label", 0)] > 1),
                             None)) is not None:
    test.add(i)
  log.warning("data.held_out=%g: %s has no split to evaluate on, so %d of its %d images are held "
              "out of training, as split 'test'; --config.data.held_out=0 trains on all", share,
              root, len(test), len(rows))
  held = {"train": [row for i, row in enumerate(rows) if i not in test],
          "test": [row for i, row in enumerate(rows) if i in test]}
  return {split: kept for split, kept in held.items() if kept}


def _image_shape(records: Sequence[dict], root: Path,
                 on_error: str) -> tuple[int | None, int | None, int]:
  """(h, w, c) from the headers, of a spread of 16,384 files if there are more."""
  def shape(record):
    try:
      return header(record)
    except BadRecord:
      if on_error == "raise":
        raise  # else reading comes upon it again, and counts it

  with ThreadPoolExecutor() as pool:
    shapes = set(pool.map(shape, records[::-(-len(records) // 16_384)])) - {None}
  if not shapes:
    raise ValueError(f"none of the images in {root} can be decoded")
  heights, widths, channels = map(set, zip(*shapes))
  uniform = len(heights) == len(widths) == 1
  return (*((heights.pop(), widths.pop()) if uniform else (None, None)), max(channels))
