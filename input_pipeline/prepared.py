"""Sets of tensorflow-datasets that are prepared, on array_record files, as sources.

TensorFlow is never imported.
"""

from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from input_pipeline.records import Source, describe, fingerprint, image_features, utf8


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
