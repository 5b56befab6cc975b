"""Where examples come from: `glyphs[/CONFIG]`, `tfds:NAME`, `tfds:PATH` or `folder:PATH`.

Every source gives random access to encoded records; `decode` turns one into pixels.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from input_pipeline import glyphs

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "test", "val", "validation")  # the sub-folders that are splits
METADATA = ("metadata.csv", "metadata.jsonl")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name by number of channels


class Info(NamedTuple):
  """What a source holds, known before any image is decoded."""
  image_shape: tuple[int | None, int | None, int]  # h w c; None where the images differ
  num_classes: int  # 0 = no labels
  class_names: tuple[str, ...]
  num_examples: dict[str, int]  # by split
  fingerprint: str  # of the content, not of where it lies: the same after a move


class Source(NamedTuple):
  """`splits[name][i]` is {"image": encoded bytes, "name": str} and, where the data has them,
  "label": int and "text": str, or a tuple of the captions of one image."""
  splits: Mapping[str, Sequence]
  info: Info


def nearest(name: str, allowed: Sequence[str]) -> str:
  """The end of an error message: what is allowed, and the nearest spelling to `name`."""
  close = get_close_matches(name, allowed, 1)
  return f"allowed: {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")


def open_source(source: str, data_dir: str | None = None) -> Source:
  """Opens a source for random access; prepares a TFDS set on first use.

  Args:
    source: `glyphs`, `glyphs/letters_16`, `tfds:NAME[/CONFIG]`, `tfds:PATH` (a prepared folder) or
      `folder:PATH`, see `_open_folder`.
    data_dir: where TFDS keeps its sets; its own default if None.

  Raises:
    ValueError, FileNotFoundError: an unknown source, or one that cannot be read, and why.
  """
  scheme, _, rest = source.partition(":")
  if source.split("/")[0] == "glyphs":
    return _open_tfds(_glyphs_builder(source, data_dir))
  if scheme == "tfds" and rest:
    return _open_tfds(_tfds_builder(rest, data_dir))
  if scheme == "folder" and rest:
    return _open_folder(Path(rest).expanduser())
  if source and Path(source).expanduser().is_dir():
    raise ValueError(f"data.source={source!r} is a folder: write 'folder:{source}' for a folder of "
                     f"images, 'tfds:{source}' for a prepared TFDS set")
  hint = nearest(source.split("/")[0] if ":" not in source else scheme + ":",
                 ("glyphs", "tfds:", "folder:"))
  raise ValueError(f"data.source={source!r} is not a source (glyphs[/CONFIG], tfds:NAME, "
                   f"tfds:PATH, folder:PATH); {hint}")


def decode(record: Mapping[str, Any], channels: int, size: tuple[int, int] | None = None,
           box: Callable | None = None) -> np.ndarray:
  """Decodes a record to uint8 (h, w, c); with `size`, a JPEG only as finely as the box needs.

  Args:
    record: {"image": encoded bytes, "name": str}.
    channels: 1, 3 or 4; colours are converted, transparency is laid on white.
    size: (h, w) in pixels to resize to (bicubic, antialiased); None keeps the size.
    box: maps the image's (h, w) to the (top, left, height, width) that is resized; None = all.

  Raises:
    ValueError: the record cannot be decoded; names it. Pillow's limit on pixels stays on.
  """
  try:
    with Image.open(io.BytesIO(record["image"])) as image:
      full_w, full_h = image.size
      top, left, height, width = box(full_h, full_w) if box else (0, 0, full_h, full_w)
      if size:  # JPEG at 1/2, 1/4 or 1/8, while the box stays at least as large as `size`
        drafted = image.draft(None, (-(-full_w * size[1] // width), -(-full_h * size[0] // height)))
      if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      if channels < 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      image = image.convert(MODES[channels])
      if size:
        scale = drafted[1][2] / full_w if drafted else 1  # exact; the sides are rounded up
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=tuple(
          side * scale for side in (left, top, left + width, top + height)))
      return np.asarray(image).reshape(image.height, image.width, channels)
  except Exception as e:
    raise ValueError(f"cannot decode the image {record['name']}: {e}") from e


# TFDS --------------------------------------------------------------------------------------------


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
  if builder.is_prepared():
    return
  try:
    builder.download_and_prepare(file_format="array_record")
  except Exception as e:
    # Another process may have finished first: TFDS renames a complete folder into place.
    if not builder.is_prepared():
      raise FileNotFoundError(
        f"data set {builder.name!r} is not prepared in {builder.data_dir}, and preparing it "
        f"failed: {type(e).__name__}: {e}\nWith no network, or for a set that needs TensorFlow, "
        "prepare it elsewhere with file_format='array_record', copy it here and pass --data_dir."
      ) from e


def _glyphs_config(source: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  name = source.partition("/")[2] or "all"
  if name not in glyphs.Glyphs.builder_configs:
    raise ValueError(f"data.source={source!r}: no such configuration {name!r}; "
                     + nearest(name, tuple(glyphs.Glyphs.builder_configs)))
  return glyphs.Glyphs(config=name, data_dir=data_dir)


def _glyphs_builder(source: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  builder = _glyphs_config(source, data_dir)
  if not builder.is_prepared():
    _prepare(builder)
    builder = _glyphs_config(source, data_dir)  # as on disk, whoever wrote it
  return builder


def glyphs_shape(source: str) -> tuple[tuple[int, int], int, int]:
  """(image size, channels, classes) of an embedded set, before it is prepared."""
  features = _glyphs_config(source, None).info.features
  *size, channels = features["image"].shape
  return tuple(size), channels, features["label"].num_classes


def _tfds_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  path = Path(name).expanduser()
  if name.startswith(("/", ".", "~")) or path.is_dir():
    if not (path / "dataset_info.json").is_file():
      inside = sorted(str(p.parent) for p in path.glob("**/dataset_info.json"))
      raise FileNotFoundError(
        f"data.source='tfds:{name}': no dataset_info.json in {path}; "
        + (f"prepared sets inside: {', '.join(inside)}" if inside else "not a prepared TFDS set"))
    return tfds.builder_from_directory(path)
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as e:
    known = tfds.list_builders(with_community_datasets=False)
    close = get_close_matches(name.split("/")[0], known, 1)
    raise ValueError(
      f"data.source='tfds:{name}': TFDS knows no such data set, and none is prepared in "
      f"{data_dir or tfds.core.constants.DATA_DIR}"
      + (f"; did you mean {close[0]!r}?" if close else "")) from e
  except (ValueError, AssertionError) as e:  # an unknown configuration or version
    raise ValueError(f"data.source='tfds:{name}': {e}") from e
  _prepare(builder)
  return builder


def _feature(features, names: Sequence[str], kind: type) -> str | None:
  """The feature that plays a role: by name, else the only one of its kind."""
  for name in names:
    if isinstance(features.get(name), kind):
      return name
  found = [key for key, feature in features.items() if isinstance(feature, kind)]
  if len(found) > 1:
    raise ValueError(f"several features could be the {names[0]}: {', '.join(sorted(found))}; "
                     f"rename one to {names[0]!r}")
  return found[0] if found else None


class _TfdsSplit(Sequence):
  """Random access to one split; picklable, for workers."""

  def __init__(self, data, prefix: str, keys: Mapping[str, str]):
    self.data, self.prefix, self.keys = data, prefix, keys

  def __len__(self):
    return len(self.data)

  def __getitem__(self, i):
    return self.__getitems__([i])[0]

  def __getitems__(self, indices):
    indices = [int(i) for i in indices]
    return [self._record(i, example)
            for i, example in zip(indices, self.data.__getitems__(indices), strict=True)]

  def _record(self, i, example):
    record = {role: example[key] for role, key in self.keys.items()}
    record["name"] = f"{self.prefix}#{i}"
    if "label" in record:
      record["label"] = int(record["label"])
    if "text" in record:
      text = record["text"]
      text = text["text"] if isinstance(text, Mapping) else text  # coco: {"id", "text"} a caption
      record["text"] = (text.decode() if isinstance(text, bytes)
                        else tuple(caption.decode() for caption in text))
    return record


def _open_tfds(builder: tfds.core.DatasetBuilder) -> Source:
  info, features = builder.info, dict(builder.info.features.items())
  image = _feature(features, ("image",), tfds.features.Image)
  if image is None:
    raise ValueError(f"{info.full_name} has no image feature: {', '.join(features)}")
  label = _feature(features, ("label",), tfds.features.ClassLabel)
  # By name only: a lone text feature is as often a file name as a caption.
  text = next((key for key in ("text", "caption", "captions") if key in features), None)
  keys = {role: key for role, key in zip(("image", "label", "text"), (image, label, text)) if key}
  try:
    data = {split: builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            for split in info.splits}
  except NotImplementedError as e:
    raise ValueError(
      f"{info.full_name} in {builder.data_dir} is stored as {info.file_format.value}, which has no "
      "random access. Convert it: tfds convert_format --out_file_format=array_record "
      f"--dataset_version_dir={builder.data_dir} --out_dir=NEW, then data.source=tfds:NEW") from e
  return Source(
    {split: _TfdsSplit(d, f"{info.full_name} {split}", keys) for split, d in data.items()},
    Info(tuple(features[image].shape), features[label].num_classes if label else 0,
         tuple(features[label].names) if label else (),
         {name: split.num_examples for name, split in info.splits.items()},
         _fingerprint(info.full_name, sorted(
           (name, list(split.shard_lengths), int(split.num_bytes))
           for name, split in info.splits.items()))))


# Folders -----------------------------------------------------------------------------------------


class _FolderSplit(Sequence):
  """Random access to the files of one split; picklable, for workers."""

  def __init__(self, root: Path, rows: list[dict]):
    self.root, self.rows = root, rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    row = self.rows[i]
    path = self.root / row["file"]
    try:
      image = path.read_bytes()
    except OSError as e:
      raise FileNotFoundError(f"cannot read the image {path}: {e}") from e
    return {"image": image, "name": str(path)} | {
      key: row[key] for key in ("label", "text") if key in row}

  def __getitems__(self, indices):
    return [self[int(i)] for i in indices]


def _open_folder(root: Path) -> Source:
  """Opens a folder of images.

  `train` beside `test`, `val` or `validation`, or alone, are splits; otherwise all is `train`. A
  split holds class sub-folders (searched through), or images only, or a `metadata.csv` /
  `metadata.jsonl` with the columns `file_name` (relative) and `text` and/or `label`; several rows
  of one file are several captions of one image. Class names are sorted, as numbers if all are.
  Hidden files and other extensions are passed over; links out of the folder are refused.
  """
  if not root.is_dir():
    raise FileNotFoundError(f"data.source='folder:{root}': no such folder")
  folders = {name for name, is_dir in _entries(root, root) if is_dir}
  splits = [name for name in SPLITS if name in folders]
  # A folder of classes may have one named "train", beside "car" and "bus".
  is_split = "train" in splits and (len(splits) > 1 or folders == {"train"})
  rows = {split: _read_split(root / split, root)
          for split in splits} if is_split else {"train": _read_split(root, root)}

  names = {str(row["label"]) for row in rows["train"] if "label" in row}
  classes = sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names)
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
  return Source({split: _FolderSplit(root, examples) for split, examples in rows.items()},
                Info(_image_shape(root, [row["file"] for r in rows.values() for row in r]),
                     len(classes), tuple(classes), {s: len(r) for s, r in rows.items()},
                     _fingerprint("folder", rows)))


def _entries(folder: Path, root: Path) -> list[tuple[str, bool]]:
  """(name, is a folder) of what a folder shows, sorted; refuses links that lead out of `root`."""
  entries = []
  for entry in os.scandir(folder):
    if entry.name.startswith("."):
      continue
    if entry.is_symlink():
      _inside(Path(entry.path), root)
      if entry.is_dir():
        raise ValueError(f"{entry.path} links to a folder, whose images would be read twice")
    entries.append((entry.name, entry.is_dir()))
  return sorted(entries)


def _inside(path: Path, root: Path) -> None:
  if not path.resolve().is_relative_to(root.resolve()):
    raise ValueError(f"{path} leads out of {root}")


def _images(folder: Path, root: Path) -> list[str]:
  """All images below a folder, relative to `root`."""
  files = []
  for name, is_dir in _entries(folder, root):
    if is_dir:
      files += _images(folder / name, root)
    elif name.lower().endswith(EXTENSIONS):
      files.append(str((folder / name).relative_to(root)))
  return files


def _read_split(folder: Path, root: Path) -> list[dict]:
  """One dict an image: file (relative to `root`), bytes, and label (a name) and text if any."""
  entries = _entries(folder, root)
  metadata = [name for name, _ in entries if name in METADATA]
  if metadata:
    if len(metadata) > 1:
      raise ValueError(f"{folder} has both {' and '.join(metadata)}: keep one")
    rows = _read_metadata(folder / metadata[0], root)
  elif classes := [name for name, is_dir in entries if is_dir]:
    if any(name.lower().endswith(EXTENSIONS) for name, _ in entries):
      raise ValueError(f"{folder} has images beside sub-folders: which class are they?")
    rows = []
    for name in classes:
      files = _images(folder / name, root)
      if not files:
        raise ValueError(f"no images in class folder {folder / name}; "
                         f"looked for {' '.join(EXTENSIONS)}")
      rows += [{"file": file, "label": name} for file in files]
  else:
    rows = [{"file": file} for file in _images(folder, root)]
  if not rows:
    raise ValueError(f"no images in {folder}; looked for {' '.join(EXTENSIONS)}")
  for row in rows:
    row["bytes"] = (root / row["file"]).stat().st_size
  return rows


def _read_metadata(path: Path, root: Path) -> list[dict]:
  """The rows of a metadata file, those of one image gathered."""
  with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a BOM
    try:
      lines = (list(csv.DictReader(file)) if path.suffix == ".csv"
               else [json.loads(line) for line in file if line.strip()])
    except (ValueError, csv.Error) as e:
      raise ValueError(f"{path}: not readable as {path.suffix[1:]}: {e}") from e
  columns = [key for key in ("label", "text") if lines and key in lines[0]]
  if lines and not columns:
    raise ValueError(f"{path} needs a column 'label' or 'text' beside 'file_name'; it has: "
                     f"{', '.join(map(str, lines[0]))}")
  rows = {}
  for number, line in enumerate(lines, 1):
    for key in ("file_name", *columns):
      if not isinstance(line.get(key), str | int) or line[key] == "":
        raise ValueError(f"{path}, row {number}: {key!r} is {line.get(key)!r}, not text or a whole "
                         "number")
    image = path.parent / str(line["file_name"])
    _inside(image, root)
    if not image.is_file():
      raise FileNotFoundError(f"{path}, row {number}: no such file {image}")
    file = os.path.relpath(image, root)
    row = rows.setdefault(file, {"file": file})
    if "label" in columns and row.setdefault("label", line["label"]) != line["label"]:
      raise ValueError(f"{path}, row {number}: {line['file_name']!r} has two labels: "
                       f"{row['label']!r} and {line['label']!r}")
    if "text" in columns:
      row["text"] = (*row.get("text", ()), str(line["text"]))
  for row in rows.values():
    if len(row.get("text", ())) == 1:
      row["text"] = row["text"][0]
  return list(rows.values())


def _image_shape(root: Path, files: Sequence[str]) -> tuple[int | None, int | None, int]:
  """(h, w, c) from the headers, of a spread of 16,384 files if there are more."""
  def header(file):
    try:
      with Image.open(root / file) as image:
        return image.height, image.width, 1 if image.mode in ("1", "L") or "I" in image.mode else 3
    except Exception as e:
      raise ValueError(f"cannot decode the image {root / file}: {e}") from e

  with ThreadPoolExecutor() as pool:
    shapes = set(pool.map(header, files[::-(-len(files) // 16_384)]))
  heights, widths, channels = map(set, zip(*shapes))
  uniform = len(heights) == len(widths) == 1
  return (*((heights.pop(), widths.pop()) if uniform else (None, None)), max(channels))


def _fingerprint(*content) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
