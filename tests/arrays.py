"""Random arrays and parameters for tests."""

import jax
import numpy as np


def normal(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(std: float, module, *args, **kwargs):
  """Every parameter random, so that no initial zero or one hides a mistake."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
  return jax.tree.map(lambda s: rng.normal(0, std, s.shape).astype(np.float32), shapes)
