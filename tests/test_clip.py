"""CLIP's towers, pooling and losses beside float64 NumPy, and on eight devices beside one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import suite

from losses import contrastive
from methods import clip as method_module
from models import clip, text
from trainer import sharding

TOWER = dict(vocab_size=20, context=8, eos_id=9, pad_id=0, width=8, depth=1, heads=2, mlp_dim=16)
MODEL = dict(vocab_size=20, context=8, eos_id=9, pad_id=0, embed_dim=6, text_width=8, text_depth=1,
             text_heads=2, image_size=8, channels=1)
VIT = dict(patch=4, width=8, depth=1, heads=2, mlp_dim=16)
RESNET = dict(backbone="resnet", depths=(1,), widths=(8,), bottleneck=False, stem="small")
SIGMOID = dict(init_scale=10.0, init_bias=-10.0)


def unit(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch_of(size):
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 9, (size, 8))
  ids[np.arange(size), rng.integers(2, 8, size)] = 9
  return {"image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
          "text": ids.astype(np.int32)}


# --- Losses ---------------------------------------------------------------------------------------

def np_loss(name, image, text, scale, bias):
  """(each example's loss, the gradient of their mean to the logits), pair by pair."""
  b = len(image)
  logits = scale * image @ text.T + bias
  if name == "softmax":
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis, keepdims=True) for axis in (1, 0))
    each = [-np.log(rows[i, i] * columns[i, i]) / 2 for i in range(b)]
    return each, (rows + columns - 2 * np.eye(b)) / (2 * b)
  each, slope = np.zeros(b), np.zeros((b, b))
  for i in range(b):
    for j in range(b):
      z = 1 if i == j else -1
      each[i] += np.log1p(np.exp(-z * logits[i, j]))
      slope[i, j] = -z / (1 + np.exp(z * logits[i, j])) / b
  return each, slope


def our_loss(name, chunk):
  def loss(image, text, scale, bias):
    value = (contrastive.clip_loss(image, text, scale, chunk) if name == "softmax" else
             contrastive.siglip_loss(image, text, scale, bias, chunk))
    assert value.dtype == jnp.float32
    return value.mean(), value
  return loss


@pytest.mark.parametrize("chunk", [0, 1, 4, 12])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_losses_and_gradients_against_numpy(name, chunk):
  image, text = unit(0, 12, 5), unit(1, 12, 5)
  scale, bias = 20.0, -3.0 if name == "sigmoid" else 0.0
  expected, slope = np_loss(name, image, text, scale, bias)
  (_, value), grads = jax.jit(jax.value_and_grad(our_loss(name, chunk), (0, 1, 2, 3), True))(
    *map(jnp.float32, (image, text, scale, bias)))
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
  by_hand = (scale * slope @ text, scale * slope.T @ image, (slope * (image @ text.T)).sum(),
             slope.sum() if name == "sigmoid" else 0.0)
  for ours, theirs in zip(grads, by_hand):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name,scale,bias", [("softmax", 100.0, 0.0), ("sigmoid", 100.0, -10.0)])
def test_chunks_change_nothing_where_exp_would_overflow(name, scale, bias):
  """Logits up to the bound of 100 on both sides, in an order that the chunks meet last."""
  image = unit(0, 16, 4)
  text = np.concatenate([-image[:8], image[8:]])
  args = (*map(jnp.float32, (image, text)), scale, bias)
  plain, chunked = (jax.jit(jax.value_and_grad(our_loss(name, chunk), (0, 1), True))(*args)
                    for chunk in (0, 2))
  expected, _ = np_loss(name, image, text, scale, bias)
  np.testing.assert_allclose(plain[0][1], expected, rtol=1e-5, atol=3e-5)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(chunked)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)  # numbers near 100 are 8e-6 apart


@pytest.mark.parametrize("chunk", [0, 1, 3, 12])
def test_nearest_text(chunk):
  image, text = unit(0, 12, 3), unit(1, 12, 3)
  ours = jax.jit(lambda *x: contrastive.nearest_text(*x, chunk))(*map(jnp.float32, (image, text)))
  np.testing.assert_array_equal(ours, (image @ text.T).argmax(1))


def test_a_chunk_that_does_not_divide_the_batch():
  with pytest.raises(ValueError, match="chunk = 5 does not divide the 12 texts"):
    contrastive.clip_loss(jnp.ones((12, 2)), jnp.ones((12, 2)), 1.0, 5)


def temporary(name, batch, chunk, devices):
  rows = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:devices]))
  x = jax.ShapeDtypeStruct((batch, 32), jnp.float32)
  gradient = jax.jit(jax.grad(lambda *x: our_loss(name, chunk)(*x, 10.0, 0.0)[0], (0, 1)),
                     in_shardings=rows, out_shardings=rows)
  return gradient.lower(x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_no_device_ever_holds_all_logits_in_chunks(name):
  """Nor its rows of them, which the plain loss has; and it holds an eighth of what one would."""
  chunked, rows = temporary(name, 4096, 64, 8), 4096**2 / 8 * 4
  assert chunked < rows / 10 < rows < temporary(name, 4096, 0, 8)
  assert chunked < temporary(name, 4096, 64, 1) / 6
  assert chunked < 3 * temporary(name, 2048, 64, 8)


@pytest.mark.parametrize("name,chunk", suite(
  [("softmax", 0), ("softmax", 8), ("sigmoid", 0), ("sigmoid", 8)], 0, 3, unpack=True))
def test_losses_on_eight_devices(name, chunk):
  """Negatives come from the whole batch, wherever its pairs are."""
  args = *map(jnp.float32, (unit(0, 32, 6), unit(1, 32, 6))), 20.0, -3.0
  run = jax.jit(jax.value_and_grad(our_loss(name, chunk), (0, 1, 2, 3), True))
  alone = run(*args)
  apart = np.mean([our_loss(name, 0)(args[0][i:i + 4], args[1][i:i + 4], *args[2:])[0]
                   for i in range(0, 32, 4)])
  assert abs(alone[0][0] - apart) > 1
  for mesh in (dict(data=8), dict(data=2, fsdp=4)):
    rows = sharding.batch_sharding(sharding.make_mesh(**mesh))
    spread = run(*jax.device_put(args[:2], rows), *args[2:])
    assert spread[1][0].sharding.is_equivalent_to(rows, 2)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread)):
      np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


# --- The bound of the scale -----------------------------------------------------------------------

def test_a_bounded_scale_goes_no_further_up_and_comes_back():
  """As the parameter that is set back after each step, but for the last step over the bound."""
  for x, g, expected in [(3.0, -1.0, -1.0), (3.0, 1.0, 1.0), (5.0, -1.0, 0.0), (5.0, 1.0, 1.0),
                         (4.0, -1.0, 0.0), (4.0, 1.0, 1.0)]:
    value, pull = jax.vjp(lambda x: method_module.at_most(x, 4.0), x)
    assert value == min(x, 4.0) and pull(jnp.float32(g))[0] == expected

  x, clamped = jnp.float32(3.9), 3.9
  for target in [5.0] * 20 + [3.0] * 60:
    x -= 0.1 * jax.grad(lambda x, t=target: (method_module.at_most(x, 4.0) - t)**2)(x)
    clamped = min(clamped - 0.1 * 2 * (clamped - target), 4.0)
    assert x <= 4.0 + 0.1 * 2 * (5.0 - 3.9)
  np.testing.assert_allclose([x, clamped], 3.0, atol=1e-3)


# --- The text tower -------------------------------------------------------------------------------

def tower_of(**fields):
  """ids -> (features, out), with parameters none of which is 0 or 1."""
  tower, rng = text.TextTower(**{**TOWER, **fields}), np.random.default_rng(0)
  shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
  params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
  apply = jax.jit(tower.apply)
  return lambda ids: jax.device_get(apply({"params": params}, np.asarray(ids, np.int32)))


POOLED = [  # ids, where "eos" and "argmax" pool them
  ([1, 5, 3, 9, 0, 0, 0, 0], 3, 3),
  ([1, 5, 3, 2, 4, 6, 7, 9], 7, 7),  # truncated: end-of-text is the last token
  ([1, 9, 3, 9, 9, 9, 9, 9], 1, 1),  # padded with end-of-text, and one in between: the first
  ([1, 5, 9, 12, 0, 0, 0, 0], 2, 3),  # a larger id after it
  ([1, 15, 3, 9, 0, 0, 0, 0], 3, 1),  # and before it
  ([9, 5, 3, 2, 0, 0, 0, 0], 0, 0),
  ([1, 5, 3, 2, 4, 6, 7, 8], 0, 7),  # none at all: as published
]


def test_pooling():
  ids = np.array([row for row, _, _ in POOLED])
  for pool, places in (("eos", [eos for _, eos, _ in POOLED]),
                       ("argmax", [largest for _, _, largest in POOLED]), ("last", [7] * 7)):
    features, out = tower_of(pool=pool)(ids)
    for row, place in enumerate(places):
      np.testing.assert_array_equal(features[row], out["tokens"][row, place])
      others = np.delete(out["tokens"][row], place, axis=0)
      assert np.abs(others - features[row]).max(1).min() > 1e-3  # no other token would do


def test_a_causal_tower_sees_no_later_token():
  ids = np.array([[1, 5, 3, 9, 0, 0, 0, 0]])
  tower = tower_of()
  before, after = tower(ids)[0], tower([[1, 5, 3, 9, 4, 9, 2, 19]])[0]
  np.testing.assert_allclose(before, after, atol=1e-6)
  assert np.abs(before - tower([[1, 6, 3, 9, 0, 0, 0, 0]])[0]).max() > 1e-2
  tower = tower_of(causal=False)
  assert np.abs(tower(ids)[0] - tower([[1, 5, 3, 9, 4, 9, 2, 19]])[0]).max() > 1e-2


@pytest.mark.parametrize("pool,pad_id", [("eos", 9), ("map", 0)])
def test_masked_padding_is_as_none(pool, pad_id):
  """With end-of-text for padding, too: its first one is text."""
  ids = np.full((1, 8), pad_id)
  ids[0, :4] = [1, 5, 3, 9]
  fields = dict(pool=pool, causal=False, pad_id=pad_id)
  shown, masked = tower_of(**fields), tower_of(**fields, mask_padding=True)
  np.testing.assert_allclose(masked(ids)[0], shown(ids[:, :4])[0], atol=1e-5)
  assert np.abs(masked(ids)[0] - shown(ids)[0]).max() > 1e-2


def test_position_matters_and_the_context_is_a_limit():
  tower = tower_of(causal=False)
  assert np.abs(tower([[1, 5, 3, 9]])[0] - tower([[5, 1, 3, 9]])[0]).max() > 1e-2
  with pytest.raises(ValueError, match="texts of 9 tokens: model.context is 8"):
    tower(np.ones((1, 9)))


def test_initial_kernels_are_clips():
  tower = text.TextTower(**{**TOWER, "width": 64, "depth": 4, "mlp_dim": 256})
  params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
  blocks = params["transformer"]["blocks"]
  for kernel, std in [
      (blocks["attention"]["qkv_kernel"], 64**-0.5),
      (blocks["attention"]["out"]["kernel"], 64**-0.5 * 8**-0.5),
      (blocks["mlp"]["up"]["kernel"], 128**-0.5),
      (blocks["mlp"]["down"]["kernel"], 64**-0.5 * 8**-0.5)]:
    assert kernel.shape[0] == 4
    np.testing.assert_allclose(np.std(kernel, axis=tuple(range(1, kernel.ndim))), std, rtol=0.05)
  np.testing.assert_allclose(np.std(params["embed"]["embedding"]), 0.02, rtol=0.1)
  np.testing.assert_allclose(np.std(params["position"]), 0.01, rtol=0.15)


# --- The network and the method -------------------------------------------------------------------

def method_of(batch_size=32, loss="softmax", chunk=0, image_train=True, tower=VIT, **fields):
  return method_module.make(clip.make(**MODEL, **tower, **fields), batch_size=batch_size, loss=loss,
                            chunk=chunk, image_train=image_train)


@pytest.mark.parametrize("variant,vocab_size,context,count", [
  ("CLIP-B/32", 49408, 77, 151_277_313), ("CLIP-B/16", 49408, 77, 149_620_737),
  ("CLIP-L/14", 49408, 77, 427_616_513), ("SigLIP-B/16", 32000, 64, 203_155_970)])
def test_parameter_count(variant, vocab_size, context, count):
  model = clip.make(variant=variant, image_size=224, channels=3, vocab_size=vocab_size,
                    context=context, eos_id=1, pad_id=0)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)),
                          jnp.zeros((1, context), jnp.int32))["params"]
  assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("fields", suite([VIT, RESNET], 0), ids=["vit", "resnet"])
def test_predictions(fields):
  method, batch = method_of(4, tower=fields, dtype="bfloat16"), batch_of(4)
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  names = ("embed_image", "embed_text", "logit_scale", "features", "tokens")
  out = jax.jit(lambda *args: {name: method.predict[name](*args) for name in names})(
    params, extra, batch, None)
  for name in ("embed_image", "embed_text"):
    assert out[name].shape == (4, 6) and out[name].dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(out[name], axis=1), 1, rtol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(out[name], np.float64), tol=1e-3) > 1
  assert out["features"].shape == (4, 8) and out["tokens"].shape[::2] == (4, 8)
  np.testing.assert_allclose(out["logit_scale"], 1 / 0.07, rtol=1e-6)
  loud = {**params, "logit_scale": jnp.float32(math.log(200))}
  np.testing.assert_allclose(method.predict["logit_scale"](loud, {}, {}, None), 100, rtol=1e-5)
  _, (_, metrics) = jax.jit(method.loss)(loud, extra, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(metrics["logit_scale"], 100, rtol=1e-5)


def test_a_text_tower_is_like_the_vit_beside_it():
  model = clip.make(**MODEL, **VIT, activation="silu", norm_eps=1e-3, scan=True, text_scan=False)
  assert (model.text.activation, model.text.norm_eps, model.text.scan) == ("silu", 1e-3, False)
  assert model.image.scan and model.text.mlp_dim == 32


def test_locked_image_tower_keeps_its_statistics():
  batch = batch_of(4)
  free, locked = (method_of(4, tower=RESNET, image_train=train) for train in (True, False))
  params, extra = jax.jit(free.init)(jax.random.key(0), batch)
  assert set(extra) == {"batch_stats"}
  for method, moves in ((free, True), (locked, False)):
    _, (after, _) = jax.jit(method.loss)(params, extra, batch, jax.random.key(0), 0)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), extra, after)
    assert set(jax.tree.leaves(changed)) == {moves}


@pytest.mark.parametrize("loss,chunk,fields", [
  ("softmax", 0, {}), pytest.param("sigmoid", 8, SIGMOID, marks=pytest.mark.slow)])
def test_training_on_eight_devices(loss, chunk, fields):
  """Metrics and the gradient of every parameter."""
  method, batch = method_of(loss=loss, chunk=chunk, **fields), batch_of(32)
  params, _ = jax.jit(method.init)(jax.random.key(0), batch)
  # The scale of a run's middle: at the start of SigLIP's all negatives are far off.
  params = {**params, **({"logit_bias": jnp.float32(0)} if fields else {})}
  run = jax.jit(jax.value_and_grad(method.loss, has_aux=True))

  def on(mesh):
    (value, (_, metrics)), grads = run(
      jax.device_put(params, sharding.replicated(mesh)), {},
      jax.device_put(batch, sharding.batch_sharding(mesh)), jax.random.key(0), 0)
    return jax.device_get((value, metrics, grads))

  one, eight = on(sharding.make_mesh(devices=jax.devices()[:1])), on(sharding.make_mesh())
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1, np.abs(a).max()))


# --- What a user may get wrong --------------------------------------------------------------------

@pytest.mark.parametrize("fields,message", [
  ({"variant": "CLIP-B/8"}, "model.variant = 'CLIP-B/8': expected one of CLIP-B/32, "),
  ({"vocab_size": None}, "needs texts: set data.tokenizer"),
  ({"text_heads": 3}, "model.text_heads = 3 does not divide model.text_width = 8"),
  ({"stem": "small"}, "model.stem: a vit has no such field"),
])
def test_bad_models(fields, message):
  with pytest.raises(ValueError, match=message):
    clip.make(**{**MODEL, **VIT, **fields})


def test_missing_sizes_are_named():
  with pytest.raises(ValueError, match="or all of embed_dim, text_width, text_depth, text_heads"):
    clip.make(image_size=8, channels=1, vocab_size=2, context=8, eos_id=1, pad_id=0, **VIT)


def test_no_projection_needs_the_towers_width():
  model = clip.make(**MODEL, **VIT, project_image=False)
  with pytest.raises(ValueError, match="model.embed_dim = 6: .* must be the 8 features"):
    jax.eval_shape(model.init, jax.random.key(0), *batch_of(2).values())


@pytest.mark.parametrize("fields,options,message", [
  ({}, {"loss": "sigmoid"}, "'sigmoid' and model.init_bias = None: the sigmoid loss needs a bias"),
  (SIGMOID, {}, "'softmax' and model.init_bias = -10.0"),
  ({}, {"chunk": 5}, "method.chunk = 5: expected 0 or a divisor of the 12 pairs"),
  ({}, {"chunk": -4}, "method.chunk = -4"),
  ({}, {"max_logit_scale": 10.0}, "max_logit_scale = 10.0: expected at least model.init_scale"),
])
def test_bad_methods(fields, options, message):
  with pytest.raises(ValueError, match=message):
    method_module.make(clip.make(**MODEL, **VIT, **fields), batch_size=12, **options)
