"""Stored latents of an autoencoder, as files or arrays, in the place of images."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from input_pipeline.reading import first_good
from input_pipeline.records import BadRecord


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


def latent_shape(records, layout: str, on_error: str) -> tuple[int, int, int]:
  """(h, w, c) of the first latent, or, with "skip", the first good one; reading finds others."""
  _, latent = first_good(records, 0, lambda record: read_latent(record, layout), on_error)
  h, w, stored = latent.shape
  return h, w, stored if layout == "mean" else stored // 2
