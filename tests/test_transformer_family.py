"""Each way to build a Transformer against float64 NumPy: one token, one head at a time.

Its default is in test_models.py, BERT's post-norm and DiT's axial rope are in their own recordings.
"""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_params
from test_models import NP_ACTIVATIONS, np_dense, np_norm, np_resample
from tiers import suite

from models import (
  attention,
  caption,
  deepnorm,
  dit,
  layers,
  mae,
  masks,
  positions,
  relative,
  resnet,
  stems,
  text,
  vit,
)
from models.transformer import Transformer

D, HEADS, L = 8, 2, 6  # features, heads, tokens


# --- The same maths in float64 NumPy --------------------------------------------------------------

NP_GATES = {"glu": lambda x: 1 / (1 + np.exp(-x)), "bilinear": lambda x: x,
            "reglu": NP_ACTIVATIONS["relu"], "geglu": NP_ACTIVATIONS["gelu"],
            "swiglu": NP_ACTIVATIONS["silu"]}


def np_mlp(x, p, activation):
  if activation in NP_GATES:
    gate, up = (np_dense(x, {k: a[..., i, :] for k, a in p["up"].items()}) for i in range(2))
    return np_dense(NP_GATES[activation](gate) * up, p["down"])
  return np_dense(NP_ACTIVATIONS[activation](np_dense(x, p["up"])), p["down"])


def np_attention(x, memory, p, seen=lambda i, j: True, bias=lambda h, i, j: 0.0,
                 turn=lambda vector, i, j, key: vector):
  """x [q, d], memory [n, d]; who sees whom, what is added, and how vectors turn, pair by pair."""
  out, weights = np.tile(p["out"]["bias"], (len(x), 1)), np.zeros((HEADS, len(x), len(memory)))
  for h, i in itertools.product(range(HEADS), range(len(x))):
    q, k, v = (source @ p["qkv_kernel"][:, s, h] + p["qkv_bias"][s, h]
               for s, source in enumerate((x[i], memory, memory)))
    if "query_norm" in p:
      q, k = np_norm(q, p["query_norm"]), np_norm(k, p["key_norm"])
    for j in range(len(memory)):
      if seen(i, j):
        score = turn(q, i, j, False) @ turn(k[j], i, j, True) / math.sqrt(len(q))
        weights[h, i, j] = math.exp(score + bias(h, i, j))
    weights[h, i] /= weights[h, i].sum()
    out[i] += weights[h, i] @ v @ p["out"]["kernel"][h]
  return out, weights


def np_transformer(x, p, memory=None, memory_seen=lambda i, j: True, placement="pre", norm=True,
                   activation="gelu", alpha=1.0, **pairs):
  """[n, d] -> [n, d], the last block's weights (those of the memory if there is one)."""
  normed = np_norm if norm else lambda x, p: x
  for layer in range(len(p["blocks"]["mlp"]["down"]["bias"])):
    block = jax.tree.map(lambda a, i=layer: a[i], p["blocks"])
    kept = {}

    def attend(y, block=block, kept=kept):
      y, kept["weights"] = np_attention(y, y, block["attention"], **pairs)
      return y

    def look(y, block=block, kept=kept):
      y, kept["weights"] = np_attention(y, memory, block["cross_attention"], memory_seen)
      return y

    def mix(y, block=block):
      return np_mlp(y, block["mlp"], activation)

    branches = {"attention": attend, "cross_attention": look, "mlp": mix}
    for name, branch in branches.items():
      if name == "cross_attention" and memory is None:
        continue
      first, second = block.get(f"{name}_norm"), block.get(f"{name}_out_norm")
      if placement == "pre":
        x = x + branch(normed(x, first))
      elif placement == "sandwich":
        x = x + normed(branch(normed(x, first)), second)
      else:
        x = normed(alpha * x + branch(x), first)
  return (np_norm(x, p["norm"]) if "norm" in p else x), kept["weights"]


def double(params):
  return jax.tree.map(np.float64, params)


# --- Norms, placements, activations, memory -------------------------------------------------------

@pytest.mark.parametrize("fields", suite([
  {"placement": "post", "cross": True}, {"placement": "sandwich", "norm": "rmsnorm"},
  {"placement": "deepnorm", "cross": True, "causal": True, "scan": True},
  {"placement": "deepnorm", "decoder_depth": 3}, {"norm": "none"}, {"cross": True, "scan": True},
  *({"activation": name} for name in layers.GATES)], 0, 2, 4, 6, 8, 10), ids=str)
def test_blocks(fields):
  model, x, memory = Transformer(2, HEADS, 12, **fields), normal(2, L, D), normal(2, 3, D, seed=2)
  kwargs = {}
  if model.cross:
    kwargs = {"memory": memory, "memory_mask": np.array([True, False, True])[None, None, None]}
  params = random_params(0.4, model, x, **kwargs)
  run = lambda p: model.apply({"params": p}, x, return_weights=True, **kwargs)  # noqa: E731
  y, weights = jax.jit(run)(params)
  chex.assert_trees_all_close(run(params), (y, weights), atol=1e-5, rtol=1e-5)
  alpha = {True: 6**0.25, False: 0.81 * 48 ** (1 / 16)}[model.cross]  # post-norm has none
  for i in range(2):
    expected = np_transformer(
      np.float64(x[i]), double(params), np.float64(memory[i]) if model.cross else None,
      lambda q, n: n != 1, model.placement, model.norm != "none", model.activation,
      alpha if model.placement == "deepnorm" else 1.0,
      seen=lambda i, j: i >= j or not model.causal)
    np.testing.assert_allclose(y[i], expected[0], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(weights[i], expected[1], atol=5e-6)
  assert ("norm" in params) == (model.placement in ("pre", "sandwich") and model.norm != "none")


def test_memory_of_another_width():
  """As one of this width that a dense layer made."""
  model, x, memory = Transformer(1, HEADS, 12, cross=True), normal(2, L, D), normal(2, 3, 5)
  params, run = random_params(0.4, model, x, memory=memory), jax.jit(
    lambda p, memory: model.apply({"params": p}, x, memory=memory))
  y, dense = run(params, memory), params.pop("memory")
  np.testing.assert_allclose(run(params, memory @ dense["kernel"] + dense["bias"]), y, atol=1e-5)
  with pytest.raises(ValueError, match="needs a memory"):
    model.apply({"params": params}, x)


@pytest.mark.parametrize("fields,alpha,beta", [  # 2203.00555 figure 2, N = 6 and M = 4
  ({"depth": 6}, 12**0.25, 48**-0.25), ({"depth": 4, "cross": True}, 12**0.25, 48**-0.25),
  ({"depth": 6, "decoder_depth": 4}, 0.81 * 5184 ** (1 / 16), 0.87 * 5184 ** (-1 / 16))])
def test_deepnorm_scales(fields, alpha, beta):
  np.testing.assert_allclose(deepnorm.deepnorm(**fields), (alpha, beta), rtol=1e-12)


@pytest.mark.slow
def test_deepnorm_at_100_layers():
  """Adam's first step moves its output little, and its gradients are alike from end to end."""
  x, target = normal(4, 6, 16), normal(4, 6, 16, seed=2)
  moved, evenness = {}, {}
  for placement in ("post", "deepnorm"):
    model = Transformer(100, 2, 32, placement=placement, activation="relu", scan=True)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    @jax.jit
    def measure(params, model=model):
      def loss(params):
        y = model.apply({"params": params}, x)
        return jnp.mean(jnp.square(y - target)), y
      gradient, y = jax.grad(loss, has_aux=True)(params)
      stepped = jax.tree.map(lambda p, g: p - 1e-4 * jnp.sign(g), params, gradient)
      squares = sum(jnp.square(g).sum(range(1, g.ndim))
                    for g in jax.tree.leaves(gradient["blocks"]))                 # l
      return jnp.sqrt(jnp.mean(jnp.square(loss(stepped)[1] - y))), jnp.sqrt(squares)

    moved[placement], norms = measure(params)
    evenness[placement] = norms.min() / norms.max()
    kernels = params["blocks"]["attention"]["qkv_kernel"]                    # l d 3 k h
    beta = 800**-0.25 if placement == "deepnorm" else 1
    np.testing.assert_allclose(kernels.std((0, 1, 3, 4)), [0.25, 0.25, 0.25 * beta], rtol=0.05)
  assert moved["deepnorm"] < 0.1 < 0.3 < moved["post"]
  assert evenness["post"] < 0.05 < 0.2 < evenness["deepnorm"]


@pytest.mark.parametrize("width,hidden", [(16, 64), (128, 512), (384, 1536), (1024, 4096)])
def test_a_gated_mlp_has_as_many_parameters(width, hidden):
  def count(activation):
    model, x = layers.Mlp(hidden, activation), jnp.zeros((1, width))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return sum(a.size for a in jax.tree.leaves(shapes))
  for activation in layers.GATES:
    np.testing.assert_allclose(count(activation), count("gelu"), rtol=0.01)


# --- Positions ------------------------------------------------------------------------------------

def complex_turn(vector, angles):
  half = len(vector) // 2
  z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * np.array(angles))
  return np.concatenate([z.real, z.imag])


def t5_bucket(away, buckets):
  """1910.10683 section 2.1 and its code: a distance each, then logarithmic up to 128."""
  if away < buckets // 2:
    return away
  share = math.log(away / (buckets // 2)) / math.log(128 / (buckets // 2))
  return min(buckets - 1, buckets // 2 + math.floor(share * (buckets - buckets // 2) + 1e-9))


SLOPES = {2: [2**-4, 2**-8], 8: [0.5**i for i in range(1, 9)], 3: [2**-4, 2**-8, 2**-2], 1: [2**-8],
          12: [*(0.5**i for i in range(1, 9)), *(0.5 ** (i / 2) for i in (1, 3, 5, 7))],
          16: [0.5 ** (i / 2) for i in range(1, 17)]}


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi_slopes(heads):
  np.testing.assert_allclose(relative.alibi_slopes(heads), SLOPES[heads], rtol=1e-12)


@pytest.mark.parametrize("count", [16, 32])
def test_buckets_of_t5(count):
  assert list(relative.buckets_of(count)) == [t5_bucket(away, count) for away in range(129)]


def pairs_of(model, params, place):
  """np_attention's arguments for tokens whose places are `place`: None, or (row, column), (at,)."""
  known = [i for i, at in enumerate(place) if at is not None]
  axes, half = len(place[known[0]]), D // HEADS // 2
  grid = model.grid

  def difference(i, j):
    return [a - b for a, b in zip(place[i], place[j])] if {i, j} <= {*known} else None

  def seen(i, j):
    delta = difference(i, j)
    return delta is None or not (model.causal and delta[0] < 0 or
                                 model.window and max(map(abs, delta)) >= model.window)

  def turn(vector, i, j, key):
    at = place[j if key else i]
    if model.positions != "rope" or at is None:
      return vector
    base = model.rope_base or {1: 10_000, 2: 100}[axes]
    return complex_turn(vector, [at[a] / model.rope_scale * base ** (-f / (half // axes))
                                 for a in range(axes) for f in range(half // axes)])

  def bias(h, i, j):
    delta = difference(i, j)
    if delta is None or model.positions not in positions.BIASES:
      return 0.0
    if model.positions == "alibi":
      return -SLOPES[HEADS][h] * math.dist(place[i], place[j])
    if model.positions == "relative":
      index = {offset: n for n, offset in enumerate(itertools.product(
        *(range(1 - side, side) for side in grid)))}
      return params["relative_bias"][index[tuple(delta)], h]
    rows = [t5_bucket(max(d, 0), 32) if model.causal else t5_bucket(abs(d), 16) + 16 * (d < 0)
            for d in delta]
    return sum(params["bucket_bias"][axis, row, h] for axis, row in enumerate(rows))

  return dict(seen=seen, turn=turn, bias=bias)


@pytest.mark.parametrize("fields", [
  {"positions": "rope", "rope_base": 50.0, "rope_scale": 2.0}, {"positions": "alibi"},
  {"positions": "relative"}, {"positions": "buckets"}, {"positions": "buckets", "causal": True},
  {"window": 2}, {"positions": "rope", "window": 3, "causal": True}], ids=str)
def test_places_in_a_text(fields):
  model, x = Transformer(1, HEADS, 12, grid=(L + 2,), **fields), normal(2, L, D)
  params = random_params(0.4, model, x)
  y, weights = jax.jit(lambda p: model.apply({"params": p}, x, return_weights=True))(params)
  pairs = pairs_of(model, double(params), [(i,) for i in range(L)])
  for i in range(2):
    expected = np_transformer(np.float64(x[i]), double(params), **pairs)
    np.testing.assert_allclose(y[i], expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(weights[i], expected[1], atol=2e-6)


@pytest.mark.parametrize("fields", [
  {"positions": "rope"}, {"positions": "alibi"}, {"positions": "relative"},
  {"positions": "buckets"}, {"window": 2}], ids=str)
def test_places_on_a_grid(fields):
  """Two tokens without a place, then all patches of a grid, or some in an order of their own."""
  model, x = Transformer(1, HEADS, 12, grid=(2, 3), **fields), normal(2, 8, D)
  params, keep = random_params(0.4, model, x, grid=(2, 3)), np.array([[4, 0, 5], [3, 2, 1]])
  grid = list(itertools.product(range(2), range(3)))
  for kept in (None, keep):
    tokens = x if kept is None else x[:, :5]
    y = jax.jit(lambda p, x, kept=kept: model.apply({"params": p}, x, grid=(2, 3), keep=kept))(
      params, tokens)
    for i in range(2):
      place = [None, None, *(grid if kept is None else [grid[n] for n in kept[i]])]
      expected, _ = np_transformer(np.float64(tokens[i]), double(params),
                                   **pairs_of(model, double(params), place))
      np.testing.assert_allclose(y[i], expected, atol=1e-5, rtol=1e-5)


def test_rope_depends_on_the_difference_of_places_alone():
  """Of grids: in test_dit.py."""
  q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=2)
  product = np.array([[np.sum(relative.rope((40,), 8, at=np.full((1, 1), a))(q)
                              * relative.rope((40,), 8, at=np.full((1, 1), a - shift))(k))
                       for a in range(5, 40, 6)] for shift in range(6)])
  np.testing.assert_allclose(product, np.tile(product[:, :1], 6), atol=1e-5)
  assert np.abs(np.diff(product[:, 0])).min() > 1e-3
  np.testing.assert_allclose(product[0, 0], np.sum(q * k), atol=1e-5)


def test_dual_chunk():
  """2402.17463's figure 2, drawn as a matrix: trained on 8 tokens, chunks of 6, 20 tokens."""
  trained, size, length = 8, 6, 20
  model = Transformer(1, HEADS, 12, causal=True, positions="rope", trained=trained)
  x = normal(2, length, D)
  params = random_params(0.4, model, x)
  run = jax.jit(lambda p, x, trained: model.clone(trained=trained).apply({"params": p}, x),
                static_argnums=2)
  y = run(params, x, trained)

  def turn(vector, i, j, key):
    chunks = i // size - j // size
    query_at = {0: i % size, 1: min(size + i % size, trained - 1)}.get(chunks, trained - 1)
    return complex_turn(vector, [(j % size if key else query_at) * 10_000 ** (-f / 2)
                                 for f in range(2)])

  for i in range(2):
    expected, _ = np_transformer(np.float64(x[i]), double(params), turn=turn,
                                 seen=lambda i, j: i >= j)
    np.testing.assert_allclose(y[i], expected, atol=1e-5, rtol=1e-5)
  plain = run(params, x, 0)
  np.testing.assert_allclose(y[:, :size], plain[:, :size], atol=1e-5)
  assert np.abs(plain - y).max() > 1e-3


def test_prefix_mask():
  mask = np.asarray(masks.prefix(jnp.array([2, 0]), 4))
  sequence_to_sequence = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
  np.testing.assert_array_equal(mask[:, 0], [sequence_to_sequence, np.tril(np.ones((4, 4)))])


# --- Decoding with a cache ------------------------------------------------------------------------

@pytest.mark.parametrize("fields", suite([
  {"scan": True}, {"positions": "rope", "qk_norm": True}, {"positions": "alibi", "window": 3},
  {"positions": "relative", "scan": True}, {"positions": "buckets", "placement": "post"},
  {"positions": "rope", "trained": 4}, {"causal": False}], 1, 3), ids=str)
def test_cached_is_uncached_token_by_token(fields):
  """From a prompt of two tokens, which see each other where attention is not causal."""
  model = Transformer(2, HEADS, 12, cross=True, grid=(L + 1,), **{"causal": True, **fields})
  x, memory, mask = normal(3, L, D), normal(3, 4, 5), np.arange(4)[None] < np.array([[4], [2], [3]])
  told = {"memory_mask": masks.padding(jnp.asarray(mask))}
  params = random_params(0.4, model, x, memory=memory)
  seen = None if model.causal else masks.prefix(jnp.full(3, 2), L)
  expected = jax.jit(lambda p: model.apply({"params": p}, x, seen, memory=memory, **told))(params)

  @jax.jit
  def decode(params):
    cache = model.apply({"params": params}, 3, L + 1, memory, method="init_cache")
    prompt, cache = model.apply({"params": params}, x[:, :2], cache=cache, index=0, **told)

    def step(cache, i):
      token = jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
      y, cache = model.apply({"params": params}, token, cache=cache, index=i, **told)
      return cache, y[:, 0]
    cache, each = jax.lax.scan(step, cache, jnp.arange(2, L))
    return jnp.concatenate([prompt, jnp.moveaxis(each, 0, 1)], axis=1), cache

  y, cache = decode(params)
  np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
  chex.assert_shape(cache["key"], (2, 3, L + 1, HEADS, D // HEADS))
  chex.assert_shape(cache["memory_value"], (2, 3, 4, HEADS, D // HEADS))


@pytest.mark.parametrize("kind", ["rope", "buckets"])
def test_a_padded_batch_is_its_single_sequences(kind):
  model, x, lengths = Transformer(2, HEADS, 12, positions=kind), normal(3, L, D), [4, 6, 1]
  params = random_params(0.4, model, x)
  valid = np.arange(L)[None] < np.array(lengths)[:, None]
  run = jax.jit(lambda p, *args: model.apply({"params": p}, *args))
  y = run(params, x, masks.padding(jnp.asarray(valid)))
  for i, length in enumerate(lengths):
    np.testing.assert_allclose(y[i, :length], run(params, x[i:i + 1, :length])[0], atol=1e-5)


# --- Towers ---------------------------------------------------------------------------------------

TINY = dict(image_size=(8, 12), channels=3, patch=4, width=16, depth=1, heads=2, mlp_dim=24)


@pytest.mark.parametrize("kind", suite(positions.RELATIVE, 0))
def test_vit_and_mae_tell_the_transformer_of_places(kind):
  """Patches in another order, told so, give the same; of another grid, as one made for it."""
  model = mae.make(**TINY, positions=kind, decoder_width=8, decoder_depth=1, decoder_heads=2)
  image, keep = normal(1, 8, 12, 3), np.array([[4, 0, 5, 2, 1, 3]])
  params = random_params(0.4, model, image, keep[:, :3], np.argsort(keep))
  encoder, of_encoder = model.encoder, params["encoder"]

  def encode(keep, image=image, grid=(2, 3), encoder=encoder, params=of_encoder):
    return jax.jit(lambda p: encoder.apply({"params": p}, vit.patchify(image, 4), grid, keep,
                                           method="encode"))(params)[:, 1:]

  def predict(model):
    return jax.jit(lambda p: model.apply({"params": p}, image, keep[:, :3], np.argsort(keep)))(
      params)

  tokens = encode(None)
  np.testing.assert_allclose(encode(keep), tokens[:, keep[0]], atol=1e-5)
  assert np.abs(encode(None, encoder=encoder.clone(positions="none")) - tokens).max() > 1e-3
  stack = {**model.decoder.stack, "positions": "none"}
  blind = model.clone(decoder=model.decoder.clone(stack=stack))
  assert np.abs(predict(model) - predict(blind)).max() > 1e-3

  expected = of_encoder
  if kind == "relative":
    table = np.float64(of_encoder["transformer"]["relative_bias"]).reshape(3, 5, 2)
    rows = np_resample(table, 7, "antialias").transpose(1, 0, 2)
    table = np_resample(rows, 3, "antialias").transpose(1, 0, 2).reshape(21, 2)
    expected = {**of_encoder, "transformer": {**of_encoder["transformer"], "relative_bias": table}}
  image, large = normal(1, 16, 8, 3), encoder.clone(image_size=(16, 8))
  np.testing.assert_allclose(encode(None, image, (4, 2)),
                             encode(None, image, (4, 2), large, expected), atol=1e-5)


@pytest.mark.parametrize("kind", text.POSITIONS)
def test_text_positions(kind):
  tower = text.TextTower(20, 8, 9, 0, width=D, depth=1, heads=HEADS, mlp_dim=12, positions=kind,
                         clip_init=False, causal=False)
  ids = np.random.default_rng(0).integers(0, 20, (2, L))
  params = random_params(0.4, tower, ids)
  x = np.float64(params["embed"]["embedding"])[ids]
  if kind == "learned":
    x = x + params["position"][:L]
  if kind == "sinusoidal":
    angles = [[i * 10_000 ** (-f / 4) for f in range(4)] for i in range(L)]
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  model = Transformer(1, HEADS, 12, positions=kind, grid=(8,))
  pairs = pairs_of(model, params["transformer"], [(i,) for i in range(L)]) if (
    kind in positions.RELATIVE) else {}
  expected = [np_transformer(row, double(params["transformer"]), **pairs)[0] for row in x]
  tokens = jax.jit(lambda p: tower.apply({"params": p}, ids)[1]["tokens"])(params)
  np.testing.assert_allclose(tokens, expected, atol=1e-5, rtol=1e-5)


# --- Stems ----------------------------------------------------------------------------------------

def np_conv(x, kernel):
  """3x3 of stride 2, padded by 1: [h, w, c] -> [h / 2, w / 2, d]."""
  x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  return np.array([[np.tensordot(x[r:r + 3, c:c + 3], kernel, 3)
                    for c in range(0, x.shape[1] - 2, 2)] for r in range(0, x.shape[0] - 2, 2)])


def test_early_convolutions():
  model, image = stems.EarlyConv(width=6, patch=4), normal(2, 8, 12, 3)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda a: rng.uniform(0.2, 1, a.shape).astype(np.float32),
                           jax.eval_shape(model.init, jax.random.key(0), image))
  params, stats = variables["params"], variables["batch_stats"]
  y = jax.jit(model.apply)(variables, image)
  for i in range(2):
    x = np.float64(image[i])
    for n, features in enumerate((3, 6)):
      x = np_conv(x, np.float64(params[f"conv_{n}"]["kernel"]))
      assert x.shape[-1] == features
      norm, running = params[f"norm_{n}"], stats[f"norm_{n}"]
      x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
      x = np.maximum(x, 0)
    np.testing.assert_allclose(y[i], x.reshape(6, 6), atol=1e-5, rtol=1e-5)


def test_hybrid():
  """R50+ViT-B/16 of 2010.11929 at 384 pixels has 98.95 million parameters, as published."""
  model = vit.make(variant="B/16", image_size=384, channels=3, num_classes=1000, scan=True,
                   patch_stem="resnet")
  image = jax.ShapeDtypeStruct((1, 384, 384, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  assert sum(a.size for a in jax.tree.leaves(shapes)) == 98_950_952
  chex.assert_shape(shapes["embed"]["projection"]["kernel"], (1024, 768))


def test_vit_on_a_stem_learns_its_statistics():
  model, image = vit.make(**TINY, patch_stem="early_conv", num_classes=3), normal(2, 8, 12, 3)
  variables = jax.jit(model.init)(jax.random.key(0), image)
  (logits, out), changed = jax.jit(lambda v: model.apply(
    v, image, train=True, mutable=["batch_stats"]))(variables)
  chex.assert_shape((logits, out["tokens"]), [(2, 3), (2, 6, 16)])
  old, new = (jax.tree.leaves(v["batch_stats"]) for v in (variables, changed))
  assert len(old) == 4 and all(np.abs(a - b).max() > 0 for a, b in zip(old, new))
  chex.assert_shape(model.filters(variables["params"]), (8, 3, 3, 3))


# --- Errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make,fields,message", [
  (vit.make, {"positions": "rope", "heads": 8}, "positions = 'rope' needs .* multiple of 4 .* 2"),
  (mae.make, {"positions": "rope", "decoder_width": 8, "decoder_heads": 4}, "rope' .decoder. nee"),
  (vit.make, {"patch_stem": "resnet", "patch": 2}, "model.patch = 2: .*'resnet' one of 4, 8, 16"),
  (vit.make, {"patch_stem": "early_conv", "patch": 4, "width": 15, "heads": 3}, "power of two"),
  (mae.make, {"patch_stem": "early_conv"}, "model.patch_stem = 'early_conv': an MAE removes")])
def test_errors(make, fields, message):
  with pytest.raises(ValueError, match=message):
    make(**{**TINY, **fields})


@pytest.mark.parametrize("fields,message", [
  ({"positions": "sincos2d"}, "model.text_positions = 'sincos2d': .*sinusoidal"),
  ({"trained": 4}, "model.text_trained = 4: .*text_positions = 'rope'"),
  ({"trained": 1, "positions": "rope"}, "model.text_trained = 1: .*at least 2"),
  ({"positions": "rope", "heads": 8}, "model.text_positions = 'rope' .* multiple of 2 .* 1"),
  ({"heads": 0}, "text_heads = 0"), ({"heads": -2}, "text_heads = -2"),
  ({"window": -1}, "text_window = -1"), ({"dropout": 1.0}, "text_dropout = 1.0"),
  ({"drop_path": 1.0}, "text_drop_path = 1.0"), ({"rope_scale": 2.0}, "rope_scale = 2.0.* 1 with"),
  ({"positions": "rope", "rope_base": 0.0}, "text_rope_base = 0.0"),
  ({"positions": "rope", "rope_scale": 0.0}, "text_rope_scale = 0.0"),
  ({"norm": "none", "qk_norm": True}, "text_qk_norm = True: expected false where norm = 'none'"),
  ({"vocab_size": None}, "it needs texts: set data.tokenizer")])
@pytest.mark.parametrize("network", [text.TextTower, caption.TextDecoder])
def test_errors_of_texts(network, fields, message):
  fields = dict(width=D, depth=1, heads=HEADS) | fields
  tokenizer = dict(vocab_size=fields.pop("vocab_size", 20), context=8, eos_id=9, pad_id=0)
  with pytest.raises(ValueError, match=message):
    text.build(network, {f"text_{name}": x for name, x in fields.items()}, dtype="float32",
               **tokenizer)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_kernels_start_by_the_fans_of_one_matrix(activation):
  """Xavier's (6 / (in + out))^1/2 for each of the two that a gated layer has in one."""
  up = layers.Mlp(64, activation).init(jax.random.key(0), jnp.zeros((1, 1, 96)))["params"]["up"]
  hidden, bound = up["bias"].shape[-1], np.abs(up["kernel"]).max()
  np.testing.assert_allclose(bound, (6 / (96 + hidden)) ** 0.5, rtol=1e-2)


@pytest.mark.slow
def test_deepnorm_scales_an_encoder_by_the_decoder_that_reads_it():
  """2203.00555 table 1: beta is 0.87 (N^4 M)^-1/16, N = 3 and M = 2; of N alone (8N)^-1/4."""
  def spread(**fields):
    model = caption.make(**{**TINY, "depth": 3}, text_width=16, text_depth=2, text_heads=2,
                         vocab_size=20, context=8, eos_id=9, pad_id=0, **fields)
    image = jnp.zeros((1, *model.image.image_size, model.image.channels))
    params = model.init(jax.random.key(0), image, jnp.zeros((1, 8), int))["params"]
    return params["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"].std()
  both, plain = spread(placement="deepnorm"), spread()
  alone = spread(placement="deepnorm", text_placement="pre")
  np.testing.assert_allclose(both / plain, 0.87 * 162 ** (-1 / 16), rtol=1e-5)
  np.testing.assert_allclose(alone / plain, 24 ** (-1 / 4), rtol=1e-5)


def test_cudnn_says_what_it_cannot_do():
  x = jnp.zeros((1, 3, 2, 8))
  with pytest.raises(ValueError, match="'cudnn' needs config.dtype = 'bfloat16'"):
    attention.ATTENTION["cudnn"](x, x, x)


def test_what_cudnn_is_given_and_that_its_refusals_are_told(monkeypatch):
  """It refuses masks of one query for all, and a bias of another type; some lengths in any case."""
  given = []

  def refuse(query, key, value, bias, mask, *, implementation):
    given.append((query.shape, bias.dtype, mask.shape, implementation))
    raise NotImplementedError("Unsupported sequence length Q 3")

  monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
  query, key = jnp.zeros((2, 3, 2, 8), jnp.bfloat16), jnp.zeros((2, 5, 2, 8), jnp.bfloat16)
  with pytest.raises(ValueError, match="attention = 'cudnn': Unsupported sequence length Q 3"):
    attention.ATTENTION["cudnn"](query, key, key, bias=jnp.zeros((1, 2, 3, 5)),
                                 mask=masks.padding(jnp.ones((2, 5), bool)))
  assert given == [(query.shape, jnp.bfloat16, (2, 1, 3, 5), "cudnn")]


def test_what_moved_is_what_it_was():
  assert dit.MLPS["swiglu"] in layers.GATES and resnet.ResNet.widths == (64, 128, 256, 512)
  for d in (384, 768, 1024, 1152):  # hidden features of DiT's SwiGLU
    assert layers.gated_hidden(d, 4 * d) == 8 * round(d / 3)
