"""The U-Net against float64 NumPy and published counts."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_params

from models import unet

TINY = dict(image_size=(8, 12), channels=3, width=8, multipliers=(1, 3), blocks=1,
            attention_at=(4,))
TIMES, LABELS = np.array([3.5, 41.0], np.float32), np.array([4, 5])


def count(model, size, channels):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)),
                          jnp.zeros(1))
  return sum(x.size for x in jax.tree.leaves(shapes))


# --- The same maths in float64 NumPy: one example, one group, one tap at a time -------------------

GROUPS = {8: 2, 16: 4, 24: 6, 32: 8, 36: 9, 48: 12}  # channels: groups


def np_norm(x, p):
  size = x.shape[-1] // GROUPS[x.shape[-1]]
  y = np.empty_like(x)
  for start in range(0, x.shape[-1], size):
    group = x[..., start:start + size]
    y[..., start:start + size] = (group - group.mean()) / np.sqrt(group.var() + 1e-6)
  return y * p["scale"] + p["bias"]


def np_dense(x, p):
  return x @ p["kernel"] + p["bias"]


def np_silu(x):
  return x / (1 + np.exp(-x))


def np_conv(x, p, stride=1):
  """A row or column of zeros on either side; strided: two at the end alone."""
  x = np.pad(x, ((1, 1), (1, 1), (0, 0)) if stride == 1 else ((0, 1), (0, 1), (0, 0)))
  rows, columns = ((side - 3) // stride + 1 for side in x.shape[:2])
  out = np.zeros((rows, columns, p["kernel"].shape[-1])) + p["bias"]
  for r in range(rows):
    for c in range(columns):
      window = x[r * stride:r * stride + 3, c * stride:c * stride + 3]
      out[r, c] += np.tensordot(window, p["kernel"], axes=3)
  return out


def np_residual(x, c, p):
  h, c = np_conv(np_silu(np_norm(x, p["norm_1"])), p["conv_1"]), np_dense(c, p["condition"])
  width = h.shape[-1]
  if len(c) == 2 * width:
    h = np_norm(h, p["norm_2"]) * (1 + c[:width]) + c[width:]
  else:
    h = np_norm(h + c, p["norm_2"])
  h = np_conv(np_silu(h), p["conv_2"])
  return (np_dense(x, p["shortcut"]) if "shortcut" in p else x) + h


def np_attention(x, p):
  y, out = np_norm(x, p["norm"]).reshape(-1, x.shape[-1]), p["out"]["bias"]
  for head in range(p["qkv"]["bias"].shape[1]):
    q, k, v = (y @ p["qkv"]["kernel"][:, i, head] + p["qkv"]["bias"][i, head] for i in range(3))
    w = np.exp(q @ k.T / np.sqrt(q.shape[1]))
    out = out + w / w.sum(1, keepdims=True) @ v @ p["out"]["kernel"][head]
  return x + out.reshape(x.shape)


def np_unet(x, t, label, p):
  """Two levels of one block, attention at the lower: [h, w, c] -> [h, w, c or 2c]."""
  condition, half = p["condition"], len(p["condition"]["time_in"]["kernel"]) // 2
  angles = [t * 10_000 ** (-i / half) for i in range(half)]
  features = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
  c = np_dense(np_silu(np_dense(features, condition["time_in"])), condition["time_out"])
  c = np_silu(c + condition["label"]["embedding"][label] if "label" in condition else c)
  skips = [np_conv(x, p["stem"])]
  skips.append(np_residual(skips[-1], c, p["down_0_0"]))
  skips.append(np_conv(skips[-1], p["down_0"], stride=2))
  x = np_residual(skips[-1], c, p["down_1_0"])
  skips.append(np_attention(x, p["down_1_0_attention"]))
  x = np_attention(np_residual(skips[-1], c, p["middle_0"]), p["middle_attention"])
  x = np_residual(x, c, p["middle_1"])
  for name in ("up_1_0", "up_1_1"):
    x = np_residual(np.concatenate([x, skips.pop()], -1), c, p[name])
    x = np_attention(x, p[f"{name}_attention"])
  x = np_conv(x.repeat(2, 0).repeat(2, 1), p["up_1"])
  for name in ("up_0_0", "up_0_1"):
    x = np_residual(np.concatenate([x, skips.pop()], -1), c, p[name])
  assert not skips
  return np_conv(np_silu(np_norm(x, p["norm"])), p["out"])


# --- Tests ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("features", [8, 24])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block(features, scale_shift):
  block, x, c = unet.ResidualBlock(features, scale_shift), normal(2, 4, 6, 8), normal(2, 16)
  params = random_params(0.2, block, x, c)
  assert ("shortcut" in params) == (features != 8)
  expected = [np_residual(*example, jax.tree.map(np.float64, params))
              for example in zip(np.float64(x), np.float64(c))]
  y = jax.jit(lambda p: block.apply({"params": p}, x, c))(params)
  np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [
  {}, {"scale_shift": True, "num_classes": 5, "head_width": 6, "learn_sigma": True}])
def test_unet(fields):
  model, x = unet.make(**{**TINY, **fields}), normal(2, 8, 12, 3)
  params = random_params(0.2, model, x, TIMES, LABELS)
  y = jax.jit(lambda p: model.apply({"params": p}, x, TIMES, LABELS))(params)
  chex.assert_shape(y, (2, 8, 12, 6 if model.learn_sigma else 3))
  p = jax.tree.map(np.float64, params)
  assert p["middle_attention"]["qkv"]["bias"].shape[1] == (4 if model.head_width else 1)
  expected = [np_unet(*example, p) for example in zip(np.float64(x), TIMES, LABELS)]
  np.testing.assert_allclose(y, expected, atol=3e-5, rtol=3e-5)


def test_groups_are_32_at_most_of_four_channels_at_least():
  for channels, groups in {**GROUPS, 2: 1, 128: 32, 144: 24, 192: 32, 320: 32, 1024: 32}.items():
    assert unet.groups(channels) == groups


def test_a_new_model_says_zero_and_its_blocks_are_their_shortcuts():
  model, x = unet.make(**TINY, num_classes=5), normal(2, 8, 12, 3)
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), x, TIMES, LABELS)
  np.testing.assert_array_equal(y, np.zeros_like(x))
  params = variables["params"]
  h, c = normal(2, 4, 6, 24), normal(2, 32, seed=2)
  block, attention = unet.ResidualBlock(24), unet.SpatialAttention(None)
  same = jax.jit(lambda p: (block.apply({"params": p["middle_0"]}, h, c),
                            attention.apply({"params": p["middle_attention"]}, h)))(params)
  chex.assert_trees_all_equal(same, (h, h))
  for name in ("conv_1", "condition"):
    kernel = np.asarray(params["middle_0"][name]["kernel"])
    fans = np.prod(kernel.shape[:-2]) * sum(kernel.shape[-2:])
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / fans), rtol=0.05)


def test_labels_and_null():
  model = unet.make(**TINY, num_classes=2)
  x, t = np.repeat(normal(1, 8, 12, 3), 4, axis=0), np.full(4, 10.0, np.float32)
  params = random_params(0.2, model, x, t)
  run = jax.jit(lambda label: model.apply({"params": params}, x, t, label))
  y = np.asarray(run(np.arange(4)))  # two classes, null, and one that has no row
  assert all(np.abs(y[i] - y[j]).max() > 0.01 for i in range(3) for j in range(i))
  assert np.isnan(y[3]).all()
  np.testing.assert_allclose(run(None), np.broadcast_to(y[2], y.shape), atol=1e-5)


def test_dropout_acts_in_training_alone():
  x, c = np.zeros((1, 64, 64, 8), np.float32), np.zeros((1, 4), np.float32)
  block = unet.ResidualBlock(8, dropout=0.25)
  params = jax.tree.map(np.zeros_like, random_params(0.2, block, x, c))
  params["norm_2"]["bias"] += 1
  params["conv_2"]["kernel"][1, 1] = np.eye(8)
  level = 1 / (1 + np.exp(-1))
  run = jax.jit(lambda train: block.apply({"params": params}, x, c, train=train, rngs={
    "dropout": jax.random.key(0)}), static_argnums=0)
  y = np.asarray(run(True))
  np.testing.assert_allclose(y[y > 0], level / 0.75, rtol=1e-5)
  sigma = np.sqrt(0.25 * 0.75 / y.size)
  assert abs((y == 0).mean() - 0.25) < 5 * sigma
  np.testing.assert_allclose(run(False), np.full_like(x, level), rtol=1e-5)


def test_compute_type_is_not_the_parameters():
  model, x = unet.make(**TINY, num_classes=5, scale_shift=True), normal(2, 8, 12, 3)
  params, half = random_params(0.2, model, x, TIMES), model.clone(dtype=jnp.bfloat16)
  variables = jax.eval_shape(half.init, jax.random.key(0), x, TIMES)
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  y, expected = (jax.jit(lambda p, m=m: m.apply({"params": p}, x, TIMES, LABELS))(params)
                 for m in (half, model))
  assert y.dtype == jnp.float32
  assert 0 < np.abs(y - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("size,fields,published", [
  # 2006.11239 appendix B: CIFAR-10, and CelebA-HQ and LSUN at 256 pixels
  (32, {}, 35_746_307),
  (256, {"multipliers": (1, 1, 2, 2, 4, 4)}, 113_673_219),
  # 2102.09672: CIFAR-10
  (32, {"blocks": 3, "attention_at": (16, 8), "head_width": 64, "scale_shift": True,
        "learn_sigma": True}, 52_546_438)])
def test_parameter_count(size, fields, published):
  assert count(unet.make(image_size=size, channels=3, **fields), size, 3) == published


@pytest.mark.parametrize("fields,words", [
  ({"multipliers": (1, 1, 1, 1)}, "halve the image 3 times, which 8x12 does not allow"),
  ({"attention_at": (16, 4)}, r"model.attention_at = \(16, 4\): no level is 16 pixels high.*8, 4"),
  ({"head_width": 5}, "model.head_width = 5 does not divide the 24 channels at 4 pixels"),
  ({"head_width": 5, "attention_at": ()}, "model.head_width = 5 does not divide the 24")])
def test_bad_sizes(fields, words):
  with pytest.raises(ValueError, match=words):
    unet.make(**{**TINY, **fields})
