"""Boxes of an image that are covered: random erasing, and the boxes of Cutout and CutMix."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def fill_box(image, top, left, height, width, fill):
  """Replaces the box (pixels, clipped at the edge) by `fill`, broadcast against the image."""
  h, w, _ = image.shape
  y, x = np.mgrid[:h, :w] + 0.5
  inside = (y > top) & (y < top + height) & (x > left) & (x < left + width)
  return jnp.where(inside[..., None], fill, image)


def erase_box(key, height, width, tries=10):
  """A box as timm's RandomErasing draws it: the first of ten tries smaller than the image.

  Its area is uniform in [0.02, 1/3] of the image's, its height / width log-uniform in [0.3, 1/0.3],
  its place uniform (1708.04896, algorithm 1; timm/data/random_erasing.py).

  Returns:
    float32 [4]: top, left, height, width in whole pixels; height and width 0 where no try fits.
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  area = height * width * jax.random.uniform(area_key, (tries,), minval=0.02, maxval=1 / 3)
  reach = math.log(1 / 0.3)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (tries,), minval=-reach, maxval=reach))
  size = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], -1)))        # tries 2
  limit = jnp.array([[height, width]], jnp.float32)
  fits = jnp.all(size < limit, -1)
  size = size[jnp.argmax(fits)] * fits.any()
  place = jnp.floor(jax.random.uniform(place_key, (2,)) * (limit[0] - size + 1))
  return jnp.concatenate([place, size])


def random_erase(key, image, prob):
  """Random erasing as in DeiT: the box of `erase_box` turns into N(0, 1) noise."""
  apply_key, box_key, noise_key = jax.random.split(key, 3)
  box = erase_box(box_key, *image.shape[:2])
  erased = fill_box(image, *box, jax.random.normal(noise_key, image.shape))
  return jnp.where(jax.random.bernoulli(apply_key, prob), erased, image)
