"""Records outside a run, such as a notebook's, as batches that its predictions take."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline import geometry, viewing
from input_pipeline.records import SIDES, Feature, at_size, is_moved


def batch_of(given: Mapping | Sequence[Mapping], features: Mapping[str, Feature],
             view: geometry.View, tokenizer: Any = None,
             latents: str | None = None) -> dict[str, np.ndarray]:
  """Host batches as evaluation has them, of any of the features that a run's data has.

  Args:
    given: a record as a source gives it (a batch of one), a list of records, or a dict whose values
      are stacked or lists.
    features: of the data; a key that is no feature is stacked as it is.
    view: how evaluation cuts.
    tokenizer, latents: the run's.

  Raises BadRecord, a ValueError, where a value is not what its feature is.
  """
  # The sizes are those of the data, and not of what comes.
  free = {name: feature._replace(shape=at_size(feature, (None, None)))
          for name, feature in features.items()}
  look = geometry.Look(functools.partial(geometry.for_evaluation, view), view.interpolation)
  rows = [_row({"name": "the record given", **row}, free, look, tokenizer, latents)
          for row in _rows(given, free)]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _row(record, features, look, tokenizer, latents) -> dict[str, np.ndarray]:
  told = {name: x for name, x in features.items() if name in record}
  arrays = {name: x for name, x in told.items() if x.kind not in ("text", "latent")}
  record = {name: np.asarray(x) if hasattr(x, "__array__") else x for name, x in record.items()}
  row = viewing.read(record, arrays, [look] if any(map(is_moved, arrays.values())) else [])
  for name, feature in told.items():
    if feature.kind == "text" and tokenizer is not None:
      text = record[name]
      row[name] = tokenizer.encode([text if isinstance(text, str) else text[0]])[0]
    elif feature.kind == "latent":
      from input_pipeline.latents import read_latent
      row[name] = read_latent(record | {"image": record[name]}, latents)
  others = record.keys() - told.keys() - {"name"}
  return row | {name: np.asarray(record[name]) for name in others}


def _rows(given, features) -> list[Mapping]:
  """One mapping an example, of a record, of several, or of columns."""
  if not isinstance(given, Mapping):
    return [*given]
  given = {name: x for name, x in given.items() if name != "name"}
  if not given:
    raise ValueError(f"no features; a record has any of {', '.join(features)}")
  if not any(_is_column(x, features.get(name)) for name, x in given.items()):
    return [given]
  lengths = {name: len(x) for name, x in given.items()}
  if len({*lengths.values()}) != 1 or not min(lengths.values()):
    raise ValueError(f"features of several examples, but of how many differs: {lengths}")
  return [dict(zip(given, row)) for row in zip(*given.values())]


def _is_column(value: Any, feature: Feature | None) -> bool:
  """Whether a value is those of several examples."""
  if isinstance(value, list):
    return feature is None or not feature.shape or feature.kind in (*SIDES, "latent")
  return hasattr(value, "ndim") and value.ndim > (len(feature.shape) if feature else 0)
