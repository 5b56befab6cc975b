"""A folder of images, or of stored latents: in class sub-folders, flat, or with a metadata file."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from input_pipeline.decode import opened
from input_pipeline.metadata import METADATA, inside, read_metadata
from input_pipeline.records import (
  BadRecord,
  Source,
  describe,
  fingerprint,
  image_features,
  nearest,
)

NEEDS_REST = True
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "test", "val", "validation")  # the sub-folders that are splits
ARRAYS = (".npy", ".npz")


class _Records(list):
  """The records of one split, whose files `decode` reads."""

  def __getitems__(self, indices):
    return [self[int(i)] for i in indices]


def open_source(rest: str, *, on_error: str = "raise", latents: str | None = None) -> Source:
  """Opens a folder of images.

  `train` beside `test`, `val` or `validation`, or alone, are splits; otherwise all is `train`. A
  split holds class sub-folders (searched through), or images only, or a `metadata.csv` /
  `metadata.jsonl` with the columns `file_name` (relative) and `text` and/or `label`; several rows
  of one file are several captions of one image. Class names are sorted, as numbers if all are.
  Hidden files and other extensions are passed over; links out of the folder are refused.
  """
  root = Path(rest).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(f"data.source='folder:{root}': no such folder")
  folders = {name for name, is_dir in _entries(root, root) if is_dir}
  splits = [name for name in SPLITS if name in folders]
  # A folder of classes may have one named "train", beside "car" and "bus".
  is_split = "train" in splits and (len(splits) > 1 or folders == {"train"})
  extensions = ARRAYS if latents else EXTENSIONS
  rows = {split: _read_split(root / split if is_split else root, root, on_error, extensions)
          for split in (splits if is_split else ["train"])}

  names = {str(row["label"]) for row in rows["train"] if "label" in row}
  numbers = all(map(str.isdecimal, names))
  classes = sorted(names, key=lambda name: (int(name), name) if numbers else name)
  index = {name: i for i, name in enumerate(classes)}
  for split, examples in rows.items():
    for row in examples:
      if "label" in row:
        label = str(row["label"])
        if label not in index:
          raise ValueError(f"{root / row['file']}: label {label!r} of split {split!r} is not a "
                           f"class of 'train'; {nearest(label, classes[:50])}")
        row["label"] = index[label]
      elif classes:
        raise ValueError(f"{root}: 'train' has labels, split {split!r} has none")
  records = {split: _Records(
    {"image": str(root / row["file"]), "name": str(root / row.get("where", row["file"]))}
    | {key: row[key] for key in ("label", "text") if key in row} for row in examples)
    for split, examples in rows.items()}
  if latents:
    from input_pipeline.latents import latent_shape
  shape = (latent_shape(records["train"][0], latents) if latents
           else _image_shape(sum(records.values(), []), root, on_error))
  features = image_features(shape, len(classes), "latent" if latents else "image",
                            text="text" in records["train"][0])
  return Source(records, describe(features, {s: len(r) for s, r in rows.items()},
                                  fingerprint("folder", rows), classes))


def _entries(folder: Path, root: Path) -> list[tuple[str, bool]]:
  """(name, is a folder) of what a folder shows, sorted; refuses links that lead out of `root`."""
  entries = []
  for entry in os.scandir(folder):
    if entry.name.startswith("."):
      continue
    if entry.is_symlink():
      inside(Path(entry.path), root)
      if entry.is_dir():
        raise ValueError(f"{entry.path} links to a folder, whose images would be read twice")
    entries.append((entry.name, entry.is_dir()))
  return sorted(entries)


def _images(folder: Path, root: Path, extensions: tuple[str, ...]) -> Iterator[str]:
  """All images below a folder, relative to `root`."""
  for name, is_dir in _entries(folder, root):
    if is_dir:
      yield from _images(folder / name, root, extensions)
    elif name.lower().endswith(extensions):
      yield str((folder / name).relative_to(root))


def _read_split(folder: Path, root: Path, on_error: str,
                extensions: tuple[str, ...] = EXTENSIONS) -> list[dict]:
  """One dict an image: file (relative to `root`), bytes, and label (a name), text, where if any."""
  entries = _entries(folder, root)
  metadata = [name for name, _ in entries if name in METADATA]
  if metadata:
    if len(metadata) > 1:
      raise ValueError(f"{folder} has both {' and '.join(metadata)}: keep one")
    rows = read_metadata(folder / metadata[0], root, on_error)
  elif classes := [name for name, is_dir in entries if is_dir]:
    if any(name.lower().endswith(extensions) for name, _ in entries):
      raise ValueError(f"{folder} has images beside sub-folders: which class are they?")
    rows = [{"file": file, "label": name} for name in classes
            for file in _images(folder / name, root, extensions)]
    if empty := set(classes) - {row["label"] for row in rows}:
      raise ValueError(f"no images in class folder {folder / min(empty)}; "
                       f"looked for {' '.join(extensions)}")
  else:
    rows = [{"file": file} for file in _images(folder, root, extensions)]
  if not rows:
    raise ValueError(f"no images in {folder}; looked for {' '.join(extensions)}")
  for row in rows:
    row["bytes"] = (root / row["file"]).stat().st_size
  return rows


def _image_shape(records: Sequence[dict], root: Path,
                 on_error: str) -> tuple[int | None, int | None, int]:
  """(h, w, c) from the headers, of a spread of 16,384 files if there are more."""
  def header(record):
    try:
      with opened(record) as image:
        return image.height, image.width, 1 if image.mode in ("1", "L") or "I" in image.mode else 3
    except BadRecord:
      if on_error == "raise":
        raise  # else reading comes upon it again, and counts it

  with ThreadPoolExecutor() as pool:
    shapes = set(pool.map(header, records[::-(-len(records) // 16_384)])) - {None}
  if not shapes:
    raise ValueError(f"none of the images in {root} can be decoded")
  heights, widths, channels = map(set, zip(*shapes))
  uniform = len(heights) == len(widths) == 1
  return (*((heights.pop(), widths.pop()) if uniform else (None, None)), max(channels))
