"""Random arrays and parameters for tests."""

import jax
import numpy as np
from PIL import Image


def normal(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(std: float, module, *args, **kwargs):
  """Every parameter random, so that no initial zero or one hides a mistake."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
  return jax.tree.map(lambda s: rng.normal(0, std, s.shape).astype(np.float32), shapes)


def photo(h=33, w=40, c=3, seed=0):
  """Smooth random uint8 image: neither flat nor noise, so that resampling errors show."""
  noise = np.random.default_rng(seed).integers(0, 256, (6, 7, c), np.uint8)
  planes = [Image.fromarray(noise[..., i]).resize((w, h), Image.BICUBIC) for i in range(c)]
  return np.stack([np.asarray(plane) for plane in planes], -1)
