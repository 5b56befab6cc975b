"""Stored latents of an autoencoder in the place of images: drawn and normalised on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.augment import Augment


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
