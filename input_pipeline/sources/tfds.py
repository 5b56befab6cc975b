"""Sets of tensorflow-datasets, by name or by place; prepared on first use, without TensorFlow."""

from pathlib import Path

import tensorflow_datasets as tfds

from input_pipeline.prepared import open_builder
from input_pipeline.records import Source, nearest

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
    raise ValueError(f"data.source='tfds:{name}': " + nearest(
      name.split("/")[0], known, "TFDS knows no such data set, and none is prepared in "
      f"{data_dir or tfds.core.constants.DATA_DIR}")) from e
  except (ValueError, AssertionError) as e:  # an unknown configuration or version
    raise ValueError(f"data.source='tfds:{name}': {e}") from e
  prepare(builder)
  return builder


def open_source(rest: str, *, data_dir: str | None = None, latents: str | None = None,
                on_error: str = "raise") -> Source:
  """Opens `tfds:NAME[/CONFIG]`, prepared if it is not, or `tfds:PATH`, a prepared folder."""
  return open_builder(_builder(rest, data_dir), latents, on_error)
