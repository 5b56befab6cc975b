"""Prepared sets of tensorflow-datasets, on array_record files. TensorFlow is never imported."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import tensorflow_datasets as tfds

from input_pipeline.records import Source, describe, fingerprint, image_features, utf8

NEEDS_REST = True


def prepare(builder: tfds.core.DatasetBuilder) -> None:
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


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
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
  prepare(builder)
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
      found = record["text"]
      found = found["text"] if isinstance(found, Mapping) else found  # coco: {"id", "text"}
      record["text"] = utf8(found) if isinstance(found, bytes) else tuple(map(utf8, found))
    return record


def open_source(rest: str, *, data_dir: str | None = None, latents: str | None = None,
                on_error: str = "raise") -> Source:
  """Opens `tfds:NAME[/CONFIG]`, prepared if it is not, or `tfds:PATH`, a prepared folder."""
  return open_builder(_builder(rest, data_dir), latents, on_error)


def open_builder(builder: tfds.core.DatasetBuilder, latents: str | None = None,
                 on_error: str = "raise") -> Source:
  """The splits of a prepared set: its image (or latent), label and captions, by type and name."""
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
  if latents:
    from input_pipeline.latents import latent_shape
  shape = (latent_shape(next(iter(splits.values())), latents, on_error) if latents
           else tuple(features[image].shape))
  names = features[label].names if label else ()
  said = image_features(shape, features[label].num_classes if label else 0,
                        "latent" if latents else "image", text=caption is not None)
  return Source(splits, describe(
    said, {name: split.num_examples for name, split in info.splits.items()},
    fingerprint(info.full_name, sorted((name, list(split.shard_lengths), int(split.num_bytes))
                                       for name, split in info.splits.items())), names))
