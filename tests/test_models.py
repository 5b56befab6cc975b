"""Models against float64 NumPy, closed forms and what must not depend on what.

Recordings of the published implementations are in test_reference.py.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_params
from tiers import suite

from models import kernels, layers, mae, positions, transformer, vit
from trainer.program import count_flops

TINY = dict(image_size=(8, 12), channels=3, patch=4, width=16, depth=2, heads=2, mlp_dim=24)


# --- The same maths in float64 NumPy: one example, one head, one patch at a time ------------------

def np_norm(x, p, eps=1e-6):
  if "bias" not in p:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p[
    "scale"] + p["bias"]


def np_dense(x, p):
  return x @ p["kernel"] + p["bias"]


NP_ACTIVATIONS = {
  "gelu": lambda x: x * np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(x),
  "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
  "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
  "relu": lambda x: np.maximum(x, 0),
  "silu": lambda x: x / (1 + np.exp(-x)),
}


def np_attention(x, memory, p, mask=None):
  """[q, d], [n, d] -> [q, d], weights [k, q, n]."""
  out, weights = p["out"]["bias"], []
  for h in range(p["qkv_bias"].shape[1]):
    q, k, v = (source @ p["qkv_kernel"][:, i, h] + p["qkv_bias"][i, h]
               for i, source in enumerate((x, memory, memory)))
    if "query_norm" in p:
      q, k = np_norm(q, p["query_norm"]), np_norm(k, p["key_norm"])
    w = np.exp(q @ k.T / np.sqrt(q.shape[1])) * (1 if mask is None else mask)
    weights.append(w / w.sum(1, keepdims=True))
    out = out + weights[-1] @ v @ p["out"]["kernel"][h]
  return out, np.stack(weights)


def np_mlp(x, p, activation="gelu"):
  return np_dense(NP_ACTIVATIONS[activation](np_dense(x, p["up"])), p["down"])


def np_transformer(x, p, activation="gelu", mask=None):
  """[n, d] -> [n, d], the last block's weights [k, n, n]."""
  for i in range(len(p["blocks"]["mlp_norm"]["scale"])):
    block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
    y = np_norm(x, block["attention_norm"])
    y, weights = np_attention(y, y, block["attention"], mask)
    x = x + y * block.get("attention_scale", 1)
    y = np_mlp(np_norm(x, block["mlp_norm"]), block["mlp"], activation)
    x = x + y * block.get("mlp_scale", 1)
  return (np_norm(x, p["norm"]) if "norm" in p else x), weights


def np_patches(image, p):
  rows, columns = image.shape[0] // p, image.shape[1] // p
  return np.array([[image[r * p + i, c * p + j, k] for i in range(p) for j in range(p)
                    for k in range(image.shape[2])] for r in range(rows) for c in range(columns)])


def np_positions(kind, grid, width, p):
  if kind == "learned":
    return p["position"]["table"]
  table = np.zeros((grid[0] * grid[1], width))
  for n in range(len(table)):
    row, column = divmod(n, grid[1])
    if kind == "sinusoidal":
      angles = n * 10_000 ** (-2 * np.arange(width // 2) / width)
      table[n] = [*np.sin(angles), *np.cos(angles)]
      continue
    for i in range(width // 4):
      frequency = 10_000 ** (-4 * i / width)
      for half, at in enumerate({"sincos2d": (column, row), "sincos2d_moco": (row, column),
                                 "none": ()}[kind]):
        start = half * width // 2 + i
        table[n, start], table[n, start + width // 4] = (np.sin(at * frequency),
                                                         np.cos(at * frequency))
  return table


def np_encode(image, p, model, keep=None):
  grid = (image.shape[0] // model.patch, image.shape[1] // model.patch)
  x = np_dense(np_patches(image, model.patch), p["embed"]["projection"])
  x = x + np_positions(model.positions, grid, model.width, p)
  prefix = [p["cls"][0] + p.get("cls_position", [0])[0]] if "cls" in p else []
  prefix += [p["registers"][0]] if "registers" in p else []
  x = np.concatenate([*prefix, x if keep is None else x[keep]])
  return np_transformer(x, p["transformer"])


def np_features(tokens, p, model):
  prefix = len(p.get("cls", [])) + (p["registers"].shape[1] if "registers" in p else 0)
  x = {"cls": tokens[0], "mean": np.mean(tokens[prefix:], 0), "none": tokens}.get(model.pool)
  if model.pool == "map":
    pool = p["map_pool"]
    x, _ = np_attention(pool["probe"][0], tokens, pool["attention"])
    x = (x + np_mlp(np_norm(x, pool["norm"]), pool["mlp"]))[0]
  return tokens[prefix:], np_norm(x, p["pool_norm"]) if "pool_norm" in p else x


# --- Transformer ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [
  *({"activation": name} for name in NP_ACTIVATIONS),
  {"norm": "rmsnorm"}, {"qk_norm": True}, {"qk_norm": True, "norm": "rmsnorm"},
  {"layer_scale": 0.1}, {"final_norm": False}])
def test_transformer_and_its_attention_weights(fields):
  model, x = transformer.Transformer(2, 2, 12, **fields), normal(2, 5, 8)
  mask = np.tril(np.ones((5, 5), bool))  # without a mask: in the ViT's test
  params = random_params(0.4, model, x)
  y, weights = jax.jit(lambda p, x: model.apply(
    {"params": p}, x, mask[None, None], return_weights=True))(params, x)
  expected = [np_transformer(row, jax.tree.map(np.float64, params),
                             fields.get("activation", "gelu"), mask) for row in np.float64(x)]
  np.testing.assert_allclose(y, [e[0] for e in expected], atol=5e-6, rtol=5e-6)
  np.testing.assert_allclose(weights, [e[1] for e in expected], atol=2e-6)
  np.testing.assert_array_equal(np.asarray(weights)[..., ~mask], 0)


@pytest.mark.parametrize("fields", [{}, {"scan": True, "remat": "full"}])
def test_attention_weights_of_every_block(fields):
  model, x = transformer.Transformer(3, 2, 12, **fields), normal(2, 5, 8)
  params = random_params(0.4, model, x)
  y, weights = jax.jit(lambda p, x: model.apply({"params": p}, x, return_weights="all"))(params, x)
  chex.assert_shape(weights, (2, 3, 2, 5, 5))
  for i in range(3):
    first = {**jax.tree.map(np.float64, params),
             "blocks": jax.tree.map(lambda a, i=i: np.float64(a[:i + 1]), params["blocks"])}
    expected = [np_transformer(row, first) for row in np.float64(x)]
    np.testing.assert_allclose(weights[:, i], [e[1] for e in expected], atol=2e-6)
  np.testing.assert_allclose(y, [e[0] for e in expected], atol=5e-6, rtol=5e-6)


def test_a_masked_token_reaches_no_other():
  model, x = transformer.Transformer(2, 2, 12), normal(1, 4, 8)
  mask = np.array([True, True, False, True]).reshape(1, 1, 1, 4)
  params = random_params(0.4, model, x)
  jacobian = jax.jacobian(lambda x: model.apply({"params": params}, x, mask)[0].sum(-1))
  reach = np.abs(jax.jit(jacobian)(x)[:, 0]).sum(-1)                         # out in
  np.testing.assert_array_equal(reach > 0, np.eye(4, dtype=bool) | mask[0, 0])


@pytest.fixture(scope="module")
def unrolled():
  x, target = normal(2, 3, 8), normal(2, 3, 8, seed=3)
  params = random_params(0.4, transformer.Transformer(2, 2, 12), x)

  def run(**fields):
    model = transformer.Transformer(2, 2, 12, dropout=0.2, drop_path=0.5, **fields)

    def loss(params, x):
      rngs = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}
      y = model.apply({"params": params}, x, train=True, rngs=rngs)
      return jnp.sum(y * target), y
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), (params, x)

  function, args = run()
  return run, jax.jit(function)(*args)


@pytest.mark.parametrize("scan,remat", suite(
  [(True, "none"), (True, "dots"), (False, "full")], 1, unpack=True))
def test_scan_and_remat_change_no_number(unrolled, scan, remat):
  run, expected = unrolled
  function, args = run(scan=scan, remat=remat)
  chex.assert_trees_all_close(jax.jit(function)(*args), expected, atol=2e-5, rtol=2e-5)
  assert ("scan[" in str(jax.make_jaxpr(function)(*args))) == scan


@pytest.mark.parametrize("scan", [False, True])
def test_remat_computes_again_what_it_says(unrolled, scan):
  flops = {}
  for remat in transformer.REMAT:
    function, args = unrolled[0](remat=remat, scan=scan)
    flops[remat] = count_flops(function, *args)
  b, n, d, hidden, depth = 2, 3, 8, 12, 2
  attention, linear = 4 * b * n * n * d, 8 * b * n * d * d + 4 * b * n * d * hidden
  assert flops["none"] == 3 * depth * (attention + linear)
  assert flops["none"] < flops["dots"] <= flops["none"] + depth * attention < flops["full"]


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_layer_norm_and_its_gradient(offset):
  x, g = normal(3, 4, 16) + np.float32(offset), normal(3, 4, 16, seed=2)
  scale, bias = normal(16, seed=3), normal(16, seed=4)

  def plain(x, scale, bias):
    normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
    return normal * scale.reshape(1, 1, -1) + bias.reshape(1, 1, -1)

  y, vjp = jax.vjp(lambda *args: kernels.layer_norm(*args, 1e-3), x, scale, bias)
  expected = np_norm(np.float64(x), {"scale": scale, "bias": bias}, 1e-3)
  np.testing.assert_allclose(y, expected, atol=1e-6 + 1e-6 * offset, rtol=1e-6)
  chex.assert_trees_all_close(vjp(g), jax.vjp(plain, x, scale, bias)[1](g),
                              atol=3e-6 + 1e-6 * offset, rtol=1e-5)


def test_layer_norm_of_bfloat16():
  x, scale, bias = jnp.asarray(normal(4, 64) + 8, jnp.bfloat16), normal(64), normal(64, seed=2)
  y, vjp = jax.vjp(lambda *args: kernels.layer_norm(*args, 1e-6), x, scale, bias)
  chex.assert_type((y, *vjp(y)), (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32))
  expected = np_norm(np.asarray(x, np.float64), {"scale": scale, "bias": bias})
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


def assert_kept(draws, rates):
  """Last axis: features of rates [d]. Kept at 1 / (1 - rate) or 0, in shares within 5 sigma."""
  draws, n = np.asarray(draws, np.float64).reshape(-1, len(rates)), draws.size // len(rates)
  np.testing.assert_allclose(draws[draws > 0], (draws > 0).astype(float).dot(
    np.diag(1 / (1 - rates)))[draws > 0], rtol=1e-6)
  share, sigma = (draws > 0).mean(0), np.sqrt(rates * (1 - rates) / n)
  np.testing.assert_array_less(np.abs(share - (1 - rates)), 5 * sigma + 1e-9)
  dropped = draws[:, rates > 0]
  correlation = np.corrcoef(dropped.T) - np.eye(dropped.shape[1])
  assert np.abs(correlation).max() < 5 / np.sqrt(n)


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path(scan):
  """Layer l's attention writes feature 2 l alone and its MLP 2 l + 1: the output is the draws."""
  x = np.zeros((4000, 2, 6), np.float32)
  model = transformer.Transformer(3, 1, 4, drop_path=0.6, final_norm=False, scan=scan)
  params = jax.tree.map(np.zeros_like, random_params(0.4, model, x[:1]))
  params["blocks"]["attention"]["out"]["bias"] = np.eye(6, dtype=np.float32)[0::2]
  params["blocks"]["mlp"]["down"]["bias"] = np.eye(6, dtype=np.float32)[1::2]
  y = model.apply({"params": params}, x, train=True, rngs={"drop_path": jax.random.key(0)})
  np.testing.assert_array_equal(y[:, 0], y[:, 1])  # an example's tokens together
  assert_kept(y[:, 0], np.array([0, 0, 0.3, 0.3, 0.6, 0.6]))
  np.testing.assert_array_equal(model.apply({"params": params}, x), np.ones_like(x))


@pytest.mark.parametrize("where", ["branch", "hidden"])
def test_dropout(where):
  x = np.zeros((2000, 2, 6), np.float32)
  if where == "branch":
    model = transformer.Transformer(1, 1, 4, dropout=0.25, final_norm=False)
    params = jax.tree.map(np.zeros_like, random_params(0.4, model, x[:1]))
    params["blocks"]["attention"]["out"]["bias"] += 1
  else:
    model = layers.Mlp(6, "relu", dropout=0.25)
    params = jax.tree.map(np.zeros_like, random_params(0.4, model, x[:1]))
    params["up"]["bias"] += 1
    params["down"]["kernel"] += np.eye(6, dtype=np.float32)
  y = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)})
  assert_kept(y.reshape(len(y), -1), np.full(12, 0.25))  # every number drawn by itself
  np.testing.assert_array_equal(model.apply({"params": params}, x), np.ones_like(x))


# --- ViT ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant,count", [
  ("Ti/16", 5_717_416), ("S/16", 22_050_664), ("B/16", 86_567_656), ("L/16", 304_326_632),
  ("H/14", 632_045_800), *((f"{size}/14", None) for size in vit.SIZES)])
def test_parameter_count(variant, count):
  model = vit.make(variant=variant, image_size=224, channels=3, num_classes=1000, scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  (d, depth, m, _), p = vit.SIZES[variant.split("/")[0]], int(variant.split("/")[1])
  block = 4 * d * (d + 1) + (d + 1) * m + (m + 1) * d + 4 * d
  embed = 3 * p * p * d + d + d + ((224 // p)**2 + 1) * d  # patches, class token, positions
  closed = embed + depth * block + 2 * d + 1001 * d - d + 1000
  assert sum(x.size for x in jax.tree.leaves(shapes)) == closed == (count or closed)


@pytest.mark.parametrize("fields", [
  {"registers": 2}, {"positions": "sincos2d"}, {"positions": "none"},
  {"pool": "mean", "class_token": True, "registers": 1, "num_classes": 0},
  {"pool": "mean", "pool_before_norm": True, "positions": "sincos2d_moco"},
  {"pool": "map", "positions": "none"}, {"pool": "none", "class_token": True, "num_classes": 0}])
def test_vit(fields):
  model = vit.make(**{**TINY, "num_classes": 5, **fields})
  image = normal(2, 8, 12, 3)
  params = random_params(0.4, model, image)
  y, out = jax.jit(lambda p, x: model.apply({"params": p}, x, return_weights=True))(params, image)
  p = jax.tree.map(np.float64, params)
  for i in range(2):
    tokens, weights = np_encode(np.float64(image[i]), p, model)
    tokens, features = np_features(tokens, p, model)
    logits = np_dense(features, p["head"]) if "head" in p else features
    expected = {"tokens": tokens, "features": features, "weights": weights, "logits": logits}
    chex.assert_trees_all_close({k: v[i] for k, v in {**out, "logits": y}.items()}, expected,
                                atol=2e-5, rtol=2e-5)


def test_compute_type_is_not_the_parameters():
  model = vit.make(**TINY, num_classes=5, pool="map", dtype="bfloat16")
  image = jnp.zeros((2, 8, 12, 3))
  (logits, out), variables = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), image, return_weights=True))
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert (logits.dtype, out["weights"].dtype) == (jnp.float32, jnp.float32)
  assert (out["tokens"].dtype, out["features"].dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize("fused", [False, True])
def test_initial_parameters(fused):
  model = vit.make(**{**TINY, "width": 64, "patch": 4}, num_classes=5, fused_init=fused,
                   layer_scale=1e-3, head_bias_init=-7.0)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 12, 3)))["params"]
  blocks, patch = params["transformer"]["blocks"], params["embed"]["projection"]["kernel"]
  qkv = np.asarray(blocks["attention"]["qkv_kernel"])                        # l d 3 k h
  fans = 64 + 3 * 64 if fused else 64 + 64
  np.testing.assert_allclose(np.abs(qkv).max((1, 3, 4)), np.sqrt(6 / fans), rtol=0.01)
  np.testing.assert_allclose(qkv.std((1, 3, 4)), np.sqrt(2 / fans), rtol=0.05)
  assert np.abs(qkv[0] - qkv[1]).min((0, 2, 3)).max() > 0  # each layer has its own draw
  np.testing.assert_allclose(patch.std(), np.sqrt(2 / (48 + 64) if fused else 1 / 48), rtol=0.05)
  np.testing.assert_array_equal(params["head"]["kernel"], 0)
  np.testing.assert_array_equal(params["head"]["bias"], -7)
  np.testing.assert_array_equal(blocks["mlp_scale"], np.full((2, 64), np.float32(1e-3)))


def test_patches_are_row_major_pixels_p_q_c():
  image = normal(2, 6, 9, 2)
  patches = vit.patchify(image, 3)
  np.testing.assert_array_equal(patches, [np_patches(one, 3) for one in image])
  np.testing.assert_array_equal(vit.unpatchify(patches, 3, (2, 3)), image)


# --- Positions ------------------------------------------------------------------------------------

def np_resample(x, size, method):
  """Along the first axis, one output at a time."""
  a = {"antialias": -0.5, "torch": -0.75}[method]

  def cubic(t):
    t = abs(t)
    return 1 + t * t * ((a + 2) * t - a - 3) if t < 1 else a * (t - 1) * (t - 2)**2 * (t < 2)

  out = []
  for i in range(size):
    centre = (i + 0.5) * len(x) / size - 0.5
    if method == "antialias":
      stretch = max(len(x) / size, 1)
      weights = {j: cubic((j - centre) / stretch) for j in range(len(x))}
      total = sum(weights.values())
    else:
      first, total = math.floor(centre) - 1, 1
      weights = {j: cubic(j - centre) for j in range(first, first + 4)}
    out.append(sum(w * x[min(max(j, 0), len(x) - 1)] for j, w in weights.items()) / total)
  return np.array(out)


@pytest.mark.parametrize("method", positions.RESAMPLE)
@pytest.mark.parametrize("grid", [(7, 9), (2, 3), (4, 3), (6, 5)])
def test_resampled_positions(method, grid):
  table = normal(20, 3)
  rows = np_resample(np.float64(table).reshape(4, 5, 3), grid[0], method)
  both = np_resample(rows.transpose(1, 0, 2), grid[1], method).transpose(1, 0, 2)
  np.testing.assert_allclose(positions.resample(jnp.asarray(table), (4, 5), grid, method),
                             both.reshape(-1, 3), atol=2e-6)


@pytest.mark.parametrize("method", positions.RESAMPLE)
def test_the_same_grid_keeps_every_bit(method):
  table = normal(20, 3)
  np.testing.assert_array_equal(positions.resample(table, (4, 5), (4, 5), method), table)


def test_vit_resamples_to_the_images_grid():
  small, image = vit.make(**TINY), normal(1, 16, 8, 3)
  large = vit.make(**{**TINY, "image_size": (16, 8)})
  params = random_params(0.4, small, normal(1, 8, 12, 3))
  table = positions.resample(params["position"]["table"], (2, 3), (4, 2))
  expected = large.apply({"params": {**params, "position": {"table": table}}}, image)[0]
  np.testing.assert_allclose(small.apply({"params": params}, image)[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", positions.FIXED)
def test_fixed_positions_of_a_grid_that_is_not_square(kind):
  table = positions.FIXED[kind]((3, 5), 16)
  np.testing.assert_allclose(table, np_positions(kind, (3, 5), 16, {}), atol=1e-6)
  assert len(np.unique(table.round(4), axis=0)) == 15


# --- MAE ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n,ratio,kept", [(196, 0.75, 49), (16, 0.5, 8), (10, 0.75, 2)])
def test_mask_from_noise(n, ratio, kept):
  noise = np.random.default_rng(0).random((3, n)).astype(np.float32)
  keep, restore, mask = map(np.asarray, mae.mask_from_noise(jnp.asarray(noise), ratio))
  chex.assert_shape((keep, restore, mask), [(3, kept), (3, n), (3, n)])
  for i in range(3):
    order = sorted(range(n), key=lambda j, i=i: noise[i, j])
    assert list(keep[i]) == order[:kept]
    assert [order[r] for r in restore[i]] == list(range(n))
    assert set(np.flatnonzero(mask[i] == 1)) == set(order[kept:])
    assert mask[i].sum() == n - kept and mask.dtype == np.float32


@pytest.fixture(scope="module")
def visible():
  """Three patches of six, in an order of their own for each example."""
  keep = np.array([[4, 0, 5], [3, 2, 1]])
  shuffle = np.array([[4, 0, 5, 1, 3, 2], [3, 2, 1, 0, 5, 4]])
  return keep, np.argsort(shuffle, axis=1), normal(2, 8, 12, 3)


@pytest.mark.parametrize("kind", ["learned", "sincos2d", "sincos2d_moco", "none"])
def test_mae(visible, kind):
  keep, restore, image = visible
  model = mae.make(**TINY, positions=kind, registers=1, decoder_width=8, decoder_depth=2,
                   decoder_heads=2)
  params = random_params(0.4, model, image, keep, restore)
  pred = jax.jit(lambda p: model.apply({"params": p}, image, keep, restore))(params)
  encoder, decoder = (jax.tree.map(np.float64, params[k]) for k in ("encoder", "decoder"))
  for i in range(2):
    tokens, _ = np_encode(np.float64(image[i]), encoder, model.encoder, keep[i])
    tokens = np_dense(tokens, decoder["embed"])
    x = np.repeat(decoder["mask_token"][0], 6, axis=0)
    for token, place in zip(tokens[2:], keep[i]):
      x[place] = token
    x = x + np_positions(kind, (2, 3), 8, decoder)
    x = np.concatenate([tokens[:2] + decoder.get("prefix_position", [0])[0], x])
    x, _ = np_transformer(x, decoder["transformer"])
    np.testing.assert_allclose(pred[i], np_dense(x, decoder["prediction"])[2:], atol=2e-5,
                               rtol=2e-5)


def test_removed_patches_reach_neither_encoder_nor_prediction(visible):
  keep, restore, image = visible
  model = mae.make(**TINY, decoder_width=8, decoder_depth=1, decoder_heads=2)
  params = random_params(0.4, model, image, keep, restore)

  def encoded(image):
    tokens = model.apply({"params": params}, vit.patchify(image, 4), (2, 3), keep,
                         method=lambda self, *args: self.encoder.encode(*args))
    chex.assert_shape(tokens, (2, 4, 16))
    return jnp.square(tokens).sum()

  def predicted(image):
    return jnp.square(model.apply({"params": params}, image, keep, restore)).sum()

  kept = np.zeros((2, 6), bool)
  np.put_along_axis(kept, keep, True, axis=1)
  for function in (encoded, predicted):
    gradient = np.abs(vit.patchify(jax.jit(jax.grad(function))(image), 4)).max(-1)
    np.testing.assert_array_equal(gradient > 0, kept)


def removed(kind, ratio, grid, batch=400):
  noise = mae.MASKING[kind](jax.random.key(3), batch, grid)
  chex.assert_shape(noise, (batch, grid[0] * grid[1]))
  return np.asarray(mae.mask_from_noise(noise, ratio)[2]).reshape(batch, *grid)


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_random_masking_and_contiguous_blocks(ratio):
  def alike(mask):  # share of neighbouring patches with one fate
    return np.mean([np.mean(mask[:, 1:] == mask[:, :-1]), np.mean(mask[..., 1:] == mask[..., :-1])])

  masks = {kind: removed(kind, ratio, (8, 10)) for kind in ("random", "block")}
  for mask in masks.values():
    np.testing.assert_array_equal(mask.sum((1, 2)), round(80 * ratio))  # exact, in every example
    assert len(np.unique(mask.reshape(len(mask), -1), axis=0)) > 0.95 * len(mask)
  np.testing.assert_allclose(masks["random"].mean(0), ratio, atol=5 * np.sqrt(0.25 / 400))
  np.testing.assert_allclose(alike(masks["random"]), ratio**2 + (1 - ratio)**2, atol=0.02)
  assert alike(masks["block"]) > alike(masks["random"]) + 0.2


@pytest.mark.parametrize("ratio,in_each", [(0.75, {1}), (0.5, {1, 2, 3, 4}), (0.9, {0, 1})])
def test_grid_masking_keeps_one_of_every_four(ratio, in_each):
  kept = 1 - removed("grid", ratio, (4, 6), batch=200)
  cells = kept.reshape(200, 2, 2, 3, 2).sum((2, 4))
  assert set(np.unique(cells)) == in_each
  assert np.all(cells.sum((1, 2)) == int(24 * (1 - ratio)))


# --- Errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [vit.make, mae.make])
@pytest.mark.parametrize("fields,message", [
  ({"variant": "X/16"}, r"model.variant = 'X/16'.*Ti.*So400m.*PATCH"),
  ({"variant": "B16"}, "'B16'"), ({"variant": "B/0"}, "'B/0'"), ({"variant": "B/x"}, "'B/x'"),
  ({}, "variant.*patch, width, depth, mlp_dim, heads"),
  ({"variant": "Ti/16", "image_size": (224, 100)}, "model.patch = 16 .*224x100"),
  ({"variant": "Ti/16", "heads": 5}, "model.heads = 5 .*model.width = 192")])
def test_errors(make, fields, message):
  with pytest.raises(ValueError, match=message):
    make(**{"image_size": 224, "channels": 3, **fields})


def test_error_names_the_decoders_fields():
  with pytest.raises(ValueError, match="model.decoder_heads = 3 .*model.decoder_width = 8"):
    mae.make(**TINY, decoder_width=8, decoder_heads=3)


def test_sincos_width():
  with pytest.raises(ValueError, match="divisible by 4, got 6"):
    positions.FIXED["sincos2d"]((2, 2), 6)
