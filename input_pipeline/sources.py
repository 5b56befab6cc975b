"""Where examples come from: `glyphs[/CONFIG]`, `tfds:NAME|PATH`, `folder:PATH` or `lines:PATH`.

Every source gives random access to encoded records; `decode` turns one into pixels.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from input_pipeline import geometry, glyphs, text

log = logging.getLogger("vitrine")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "test", "val", "validation")  # the sub-folders that are splits
ARRAYS = (".npy", ".npz")
LATENTS = ("mean", "mean_std", "moments")  # what the channels of a stored latent are
METADATA = ("metadata.csv", "metadata.jsonl")


class Info(NamedTuple):
  """What a source holds, known before any image is decoded."""
  image_shape: tuple[int | None, int | None, int]  # h w c; None where the images differ
  num_classes: int  # 0 = no labels
  class_names: tuple[str, ...]
  num_examples: dict[str, int]  # by split
  fingerprint: str  # of the content, not of where it lies: the same after a move


class Source(NamedTuple):
  """`splits[name][i]` is {"image": encoded bytes or their file, "name": str} and, where the data
  has them, "label": int and "text": str, or a tuple of captions where images have several. Of
  latents "image" is the array or its file; of texts alone it is None."""
  splits: Mapping[str, Sequence]
  info: Info


class BadRecord(ValueError):
  """BadRecord(kind, message): one that `data.on_error="skip"` passes over, counted by its kind."""

  def __str__(self):
    return self.args[1]


def tell_skipped(errors: Sequence[BadRecord], source: str) -> None:
  """Warns of what was passed over, if anything: how many of each kind, and the first."""
  if errors:
    kinds = Counter(error.args[0] for error in errors)
    log.warning("data.on_error='skip': passed over %d of %s (%s). The first: %s", len(errors),
                source, ", ".join(f"{kind} {n}" for kind, n in kinds.items()), errors[0])


def nearest(name: str, allowed: Sequence[str]) -> str:
  """The end of an error message: what is allowed, and the nearest spelling to `name`."""
  close = get_close_matches(name, allowed, 1)
  return f"allowed: {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")


def open_source(source: str, data_dir: str | None = None, on_error: str = "raise",
                latents: str | None = None, held_out: float = 0.05) -> Source:
  """Opens a source for random access; prepares a TFDS set on first use.

  Args:
    source: `glyphs`, `glyphs/letters_16`, `tfds:NAME[/CONFIG]`, `tfds:PATH` (a prepared folder),
      `folder:PATH`, see `_open_folder`, or `lines:PATH`, see `_open_lines`.
    data_dir: where TFDS keeps its sets; its own default if None.
    on_error: "skip" passes over the bad rows of a metadata file, and warns of their number.
    latents: one of LATENTS where arrays of an autoencoder stand in the place of images: a folder's
      files are .npy or .npz, a TFDS set has a feature "latent" or "moments".
    held_out: share of `lines:` that the split "test" has.

  Raises:
    ValueError, FileNotFoundError: an unknown source, or one that cannot be read, and why.
  """
  scheme, _, rest = source.partition(":")
  if source.split("/")[0] == "glyphs":
    return _open_tfds(_glyphs_builder(source, data_dir))
  if scheme == "tfds" and rest:
    return _open_tfds(_tfds_builder(rest, data_dir), latents)
  if scheme == "folder" and rest:
    return _open_folder(Path(rest).expanduser(), on_error, latents)
  if scheme == "lines" and rest:
    return _open_lines(Path(rest).expanduser(), on_error, held_out)
  if source and Path(source).expanduser().is_dir():
    raise ValueError(f"data.source={source!r} is a folder: write 'folder:{source}' for a folder of "
                     f"images, 'tfds:{source}' for a prepared TFDS set")
  hint = nearest(source.split("/")[0] if ":" not in source else scheme + ":",
                 ("glyphs", "tfds:", "folder:", "lines:"))
  raise ValueError(f"data.source={source!r} is not a source (glyphs[/CONFIG], tfds:NAME, "
                   f"tfds:PATH, folder:PATH, lines:PATH); {hint}")


def decode(record: Mapping[str, Any], channels: int) -> np.ndarray:
  """Decodes a record to uint8 (h, w, c).

  Args:
    record: {"image": encoded bytes or their file, "name": str}. None is one black pixel.
    channels: 1, 3 or 4; colours are converted, transparency is laid on white.

  Raises:
    BadRecord: the record cannot be decoded; names it. Pillow's limit on pixels stays on.
  """
  if record["image"] is None:
    return np.zeros((1, 1, channels), np.uint8)
  with _opened(record) as image:
    return _array(_converted(_jpeg(image, (0, 0)), channels), channels)


def decode_looks(record: Mapping[str, Any], channels: int, looks: Sequence[geometry.Look],
                 coarse: bool = False) -> list[np.ndarray]:
  """Decodes a record once, for what each look sees of it: uint8 (h, w, c).

  With `coarse`, a JPEG is decoded only as finely as the looks need: at 1/2, 1/4 or 1/8 while each
  box stays at least as large as what it is resized to. Raises as `decode`.
  """
  with _opened(record) as image:
    full_w, full_h = image.size
    cuts = [look.cut(full_h, full_w) for look in looks]
    drafted = None
    if coarse:
      drafted = image.draft(None, (
        max(math.ceil(full_w * cut.size[1] / cut.box[3]) for cut in cuts),
        max(math.ceil(full_h * cut.size[0] / cut.box[2]) for cut in cuts)))
    image = _jpeg(image, image.size if image.size != (full_w, full_h) else (0, 0))
    image = _converted(image, channels)
    scale = drafted[1][2] / full_w if drafted else 1  # exact; the sides are rounded up
    return [_array(geometry.see(image, cut, look.interpolation, look.exact, scale), channels)
            for cut, look in zip(cuts, looks)]


def _converted(image: Image.Image, channels: int) -> Image.Image:
  if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if channels < 4 and image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  mode = geometry.MODES[channels]
  return image if image.mode == mode else image.convert(mode)


def _array(pixels: Any, channels: int) -> np.ndarray:
  pixels = np.asarray(pixels)
  return pixels.reshape(*pixels.shape[:2], channels)


def _jpeg(image: Image.Image, least: tuple[int, int]) -> Image.Image:
  """Decodes a JPEG in colour, at least as large as `least`: Pillow's pixels, in 2/3 of its time.

  Any other image comes back as it is; so does one with a fault, for Pillow to judge.
  """
  if image.format != "JPEG" or image.mode != "RGB":
    return image
  image.fp.seek(0)
  try:
    return Image.fromarray(simplejpeg.decode_jpeg(
      image.fp.read(), min_width=least[0], min_height=least[1]))
  except ValueError:
    return image


@contextlib.contextmanager
def _opened(record: Mapping[str, Any]):
  """A record's image, its header read; whatever goes wrong with it meanwhile is a BadRecord."""
  data = record["image"]
  try:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
      yield image
  except Exception as e:
    raise BadRecord("undecodable image", f"cannot decode the image {record['name']}: {e}") from e


def read_latent(record: Mapping[str, Any], layout: str) -> np.ndarray:
  """A stored latent as float32 (h, w, c), with its deviations (h, w, 2c) unless it is "mean" only.

  Args:
    record: {"image": array, or a .npy or .npz file that holds one (or one named "moments" or
      "latent"), "name": str}. Leading axes of length 1 are dropped. Channels are first where the
      other two axes are equal or it is shorter than the last, else last.
    layout: "mean"; "mean_std", or "moments" (mean and log variance), one after the other in the
      channels, as an AutoencoderKL gives them.

  Raises:
    BadRecord: it cannot be read, is not finite or is no such array. Nothing is unpickled.
  """
  array = record["image"]
  try:
    if isinstance(array, str | os.PathLike):
      array = np.load(array, allow_pickle=False)
      if isinstance(array, np.lib.npyio.NpzFile):
        names = [name for name in ("moments", "latent") if name in array.files] or array.files
        if len(names) != 1:
          raise ValueError(f"it holds {', '.join(array.files) or 'nothing'}")
        array = array[names[0]]
    array = np.asarray(array, np.float32)
    array = array.reshape(array.shape[max(0, array.ndim - 3):]) if array.ndim > 3 else array
    if array.ndim != 3 or not np.isfinite(array).all():
      raise ValueError(f"shape {array.shape}, {np.isfinite(array).sum()} of {array.size} finite")
    first, middle, last = array.shape
    if middle == last or (first != middle and first < last):
      array = array.transpose(1, 2, 0)                                       # h w c
    if layout == "mean":
      return array
    if array.shape[-1] % 2:
      raise ValueError(f"data.latents={layout!r} needs an even number of channels, it has "
                       f"{array.shape[-1]}")
  except Exception as e:
    raise BadRecord("unreadable latent", f"cannot read the latent {record['name']}: {e}") from e
  mean, spread = np.split(array, 2, axis=-1)
  std = np.exp(np.clip(spread, -30, 20) / 2) if layout == "moments" else spread
  return np.concatenate([mean, std], axis=-1)


def captions(record: Mapping[str, Any]) -> tuple[str, ...]:
  """The captions of a record. Raises BadRecord if there are none, or one is empty or not UTF-8."""
  found = (record["text"],) if isinstance(record["text"], str) else record["text"]
  for caption in found or ("",):
    if why := text.fault(caption):
      raise BadRecord("unusable text", f"{record['name']}: a caption is {why}: {caption!r}")
  return found


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


def _utf8(data: bytes) -> str:
  return data.decode(errors="surrogateescape")  # what is not UTF-8 is left to `captions` to find


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
      found = record["text"]
      found = found["text"] if isinstance(found, Mapping) else found  # coco: {"id", "text"}
      record["text"] = _utf8(found) if isinstance(found, bytes) else tuple(map(_utf8, found))
    return record


def _open_tfds(builder: tfds.core.DatasetBuilder, latents: str | None = None) -> Source:
  info, features = builder.info, dict(builder.info.features.items())
  if latents:
    image = next((key for key in ("latent", "moments") if key in features), None)
  else:
    image = _feature(features, ("image",), tfds.features.Image)
  if image is None:
    raise ValueError(f"{info.full_name} has no {'latent or moments' if latents else 'image'} "
                     f"feature: {', '.join(features)}")
  label = _feature(features, ("label",), tfds.features.ClassLabel)
  # By name only: a lone text feature is as often a file name as a caption.
  caption = next((key for key in ("text", "caption", "captions") if key in features), None)
  keys = {"image": image, "label": label, "text": caption}
  keys = {role: key for role, key in keys.items() if key}
  try:
    data = {split: builder.as_data_source(
      split, decoders=None if latents else {image: tfds.decode.SkipDecoding()})
      for split in info.splits}
  except NotImplementedError as e:
    raise ValueError(
      f"{info.full_name} in {builder.data_dir} is stored as {info.file_format.value}, which has no "
      "random access. Convert it: tfds convert_format --out_file_format=array_record "
      f"--dataset_version_dir={builder.data_dir} --out_dir=NEW, then data.source=tfds:NEW") from e
  splits = {split: _TfdsSplit(d, f"{info.full_name} {split}", keys) for split, d in data.items()}
  shape = (_latent_shape(next(iter(splits.values()))[0], latents) if latents
           else tuple(features[image].shape))
  return Source(
    splits,
    Info(shape, features[label].num_classes if label else 0,
         tuple(features[label].names) if label else (),
         {name: split.num_examples for name, split in info.splits.items()},
         _fingerprint(info.full_name, sorted(
           (name, list(split.shard_lengths), int(split.num_bytes))
           for name, split in info.splits.items()))))


# Texts -------------------------------------------------------------------------------------------


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
    return {"image": None, "name": f"{self.path}, line {number}",
            "text": _utf8(file.read(length)).strip()}


def _open_lines(path: Path, on_error: str, held_out: float) -> Source:
  """Opens a text file in UTF-8, a text a line; lines that are empty are passed over.

  A line is of the split "test" or "train" by what it says, so that no text is in both. Its image is
  one black pixel.
  """
  if not 0 < held_out < 1:
    raise ValueError(f"data.held_out={held_out}: expected a number in (0, 1)")
  if not path.is_file():
    raise FileNotFoundError(f"data.source='lines:{path}': no such file")
  places, errors, start, content = {"train": [], "test": []}, [], 0, hashlib.sha256()
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      said = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
      why = text.fault(_utf8(said))
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
                Info((1, 1, 1), 0, (), {split: len(rows) for split, rows in places.items()},
                     _fingerprint("lines", content.hexdigest(), held_out)))


# Folders -----------------------------------------------------------------------------------------


class _Records(list):
  """The records of one split, whose files `decode` reads."""

  def __getitems__(self, indices):
    return [self[int(i)] for i in indices]


def _open_folder(root: Path, on_error: str, latents: str | None = None) -> Source:
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
  extensions = ARRAYS if latents else EXTENSIONS
  rows = {split: _read_split(root / split if is_split else root, root, on_error, extensions)
          for split in (splits if is_split else ["train"])}

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
  records = {split: _Records(
    {"image": str(root / row["file"]), "name": str(root / row.get("where", row["file"]))}
    | {key: row[key] for key in ("label", "text") if key in row} for row in examples)
    for split, examples in rows.items()}
  shape = (_latent_shape(records["train"][0], latents) if latents
           else _image_shape(sum(records.values(), []), root, on_error))
  return Source(records, Info(shape, len(classes), tuple(classes),
                              {s: len(r) for s, r in rows.items()}, _fingerprint("folder", rows)))


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
    rows = _read_metadata(folder / metadata[0], root, on_error)
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


def _read_metadata(path: Path, root: Path, on_error: str) -> list[dict]:
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
      _inside(image, root)
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
    if why := text.fault(str(value)):
      raise BadRecord(f"unusable {key}", f"{key!r} is {value!r}, which is {why}, for file "
                                         f"{cells['file_name']!r}")


def _image_shape(records: Sequence[dict], root: Path,
                 on_error: str) -> tuple[int | None, int | None, int]:
  """(h, w, c) from the headers, of a spread of 16,384 files if there are more."""
  def header(record):
    try:
      with _opened(record) as image:
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


def _latent_shape(record: Mapping[str, Any], layout: str) -> tuple[int, int, int]:
  """(h, w, c) of the first latent; `batches.load` and grain find one that differs."""
  h, w, stored = read_latent(record, layout).shape
  return h, w, stored if layout == "mean" else stored // 2


def _fingerprint(*content) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
