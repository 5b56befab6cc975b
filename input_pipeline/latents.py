"""Stored latents of an autoencoder in the place of images: drawn and normalised on the device."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.augment import Augment
from input_pipeline.records import BadRecord


def make(*, image_size: int | tuple[int, int], latents: str, scale: float = 1.0,
         shift: float = 0.0) -> Augment:
  """What `augment.make` is for images: (z - shift) scale, float32, of stored latents.

  In training z is drawn anew each time from what `read_latent` gives, as latent diffusion
  does (2112.10752, appendix G: scale 0.18215); in evaluation it is the mean.

  Args:
    image_size: of a latent, in its own elements.
    latents: `data.latents`; with "mean" nothing is drawn.
    scale, shift: numbers that give latents unit variance around 0, part of the autoencoder.

  Raises:
    ValueError: scale is not above 0.
  """
  if not scale > 0:
    raise ValueError(f"augment.scale = {scale}: must be above 0")
  size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)

  def normalised(batch, draw):
    stored = batch["image"]                                                  # b h w c or 2c
    if stored.shape[1:3] != size:
      raise ValueError(f"augment.image_size = {size}: the latents are {stored.shape[1:3]}, and are "
                       "not resized")
    if latents != "mean":
      mean, std = jnp.split(stored, 2, axis=-1)                              # b h w c
      stored = draw(mean, std)
    return {**batch, "image": (stored.astype(jnp.float32) - shift) * scale}

  def train(rng, batch):
    return normalised(batch, lambda mean, std: mean + std * jax.random.normal(rng, mean.shape))

  def to_pixels(latent):
    """Not what they stand for, which their decoder knows: +-3 deviations as grey levels."""
    return np.asarray(latent) / 6 + 0.5

  return Augment(train, lambda batch: normalised(batch, lambda mean, std: mean), to_pixels)


# --- On the host ----------------------------------------------------------------------------------

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


def latent_shape(record: Mapping[str, Any], layout: str) -> tuple[int, int, int]:
  """(h, w, c) of the first latent; reading finds one that differs."""
  h, w, stored = read_latent(record, layout).shape
  return h, w, stored if layout == "mean" else stored // 2
