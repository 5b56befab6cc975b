"""Losses against float64 NumPy, written one example and one class at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses import accuracy, classification, reconstruction

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def normal(*shape, scale=1.0, seed=0):
  return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def log_sigmoid(z):
  return -np.logaddexp(0, -z)


NP_LOSSES = {
  "softmax": lambda z, y: sum(y[c] * (np.logaddexp.reduce(z) - z[c]) for c in range(len(z))),
  "sigmoid_sum": lambda z, y: -sum(y[c] * log_sigmoid(z[c]) + (1 - y[c]) * log_sigmoid(-z[c])
                                   for c in range(len(z))),
}
NP_LOSSES["sigmoid"] = lambda z, y: NP_LOSSES["sigmoid_sum"](z, y) / len(z)


@DTYPES
@pytest.mark.parametrize("scale", [1, 60])  # exp(60 * 3) overflows float32
@pytest.mark.parametrize("name", classification.LOSSES)
def test_classification_losses(name, scale, dtype):
  z = jnp.asarray(normal(6, 7, scale=scale), dtype)
  y = np.random.default_rng(1).dirichlet(np.ones(7), 6).astype(np.float32)
  values = classification.LOSSES[name](z, y)
  assert values.dtype == jnp.float32
  expected = [NP_LOSSES[name](*pair) for pair in zip(np.asarray(z, np.float64), np.float64(y))]
  np.testing.assert_allclose(values, expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name,share", [("softmax", 1), ("sigmoid_sum", 1), ("sigmoid", 1 / 7)])
def test_gradient_is_probability_minus_target(name, share):
  z, y = normal(5, 7), np.eye(7, dtype=np.float32)[[0, 3, 3, 6, 1]]
  gradient = jax.grad(lambda z: classification.LOSSES[name](z, y).sum())(z)
  z = np.float64(z)
  odds = np.exp(z)
  probability = odds / odds.sum(1, keepdims=True) if name == "softmax" else odds / (1 + odds)
  np.testing.assert_allclose(gradient, share * (probability - y), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed,multi_label", [(False, False), (True, False), (True, True)])
def test_targets(smoothing, mixed, multi_label):
  label, other, mix = np.array([2, 0, 4, 1]), np.array([2, 3, 0, 4]), [0.25, 0.5, 0.9, 0.625]
  expected = np.full((4, 5), smoothing / 5)
  for i in range(4):
    if multi_label:
      for c in {label[i], other[i]}:
        expected[i, c] += 1 - smoothing
    else:
      expected[i, label[i]] += (1 - smoothing) * (mix[i] if mixed else 1)
      expected[i, other[i]] += (1 - smoothing) * (1 - mix[i] if mixed else 0)
  second = dict(label_mix=other, mix=jnp.asarray(mix)) if mixed else {}
  y = classification.targets(label, 5, smoothing, multi_label=multi_label, **second)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_correct(k):
  logits, label = normal(200, 5), np.arange(200) % 5
  higher = (logits > logits[np.arange(200), label].reshape(-1, 1)).sum(1)
  np.testing.assert_array_equal(accuracy.topk_correct(logits, label, k), higher < k)


@DTYPES
def test_patch_statistics(dtype):
  patches = jnp.asarray(normal(2, 3, 12, scale=3) + 5, dtype).at[0, 0].set(5)  # one is blank
  mean, std = reconstruction.patch_statistics(patches)
  assert (mean.dtype, std.dtype) == (jnp.float32, jnp.float32)
  x = np.asarray(patches, np.float64)
  centre = x.sum(-1) / 12
  variance = ((x - centre[..., None])**2).sum(-1) / 11
  np.testing.assert_allclose(mean[..., 0], centre, rtol=1e-6)
  np.testing.assert_allclose(std[..., 0], (variance + 1e-6)**0.5, rtol=1e-5)
  np.testing.assert_allclose(std[0, 0, 0], 1e-3, rtol=1e-6)


@DTYPES
def test_masked_mse(dtype):
  pred, target = (jnp.asarray(normal(3, 4, 6, seed=s) + 20, dtype) for s in (0, 1))
  mask = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]], np.float32)
  loss = reconstruction.masked_mse(pred, target, mask)
  assert loss.dtype == jnp.float32
  p, t = np.asarray(pred, np.float64), np.asarray(target, np.float64)
  expected = [np.mean([(p[i, n] - t[i, n])**2 for n in range(4) if mask[i, n]]) for i in range(3)]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
