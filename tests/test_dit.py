"""DiT against float64 NumPy, closed forms and published counts.

The recording of the published implementation is in test_reference_dit.py.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_params
from tiers import suite

from models import dit, relative
from trainer import sharding
from trainer.program import count_flops

TINY = dict(image_size=(8, 12), channels=3, patch=4, width=16, depth=2, heads=2)
TIMES, LABELS = np.array([3.5, 870.0], np.float32), np.array([4, 5])


# --- The same maths in float64 NumPy: one example, one head at a time -----------------------------

def np_norm(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def np_dense(x, p):
  return x @ p["kernel"] + p["bias"]


def np_silu(x):
  return x / (1 + np.exp(-x))


def np_timestep(t, features=256):
  angles = [t * 10_000 ** (-2 * i / features) for i in range(features // 2)]
  return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def np_rotate(x, grid):
  """[n, d] as d / 2 complex numbers, turned by row and column."""
  n, d = x.shape
  z = x[:, :d // 2] + 1j * x[:, d // 2:]
  for at in range(n):
    row, column = divmod(at, grid[1])
    for i in range(d // 4):
      z[at, i] *= np.exp(1j * row * 100 ** (-4 * i / d))
      z[at, i + d // 4] *= np.exp(1j * column * 100 ** (-4 * i / d))
  return np.concatenate([z.real, z.imag], axis=1)


def np_attention(x, p, grid, rope):
  out = p["out"]["bias"]
  for h in range(p["qkv_bias"].shape[1]):
    q, k, v = (x @ p["qkv_kernel"][:, i, h] + p["qkv_bias"][i, h] for i in range(3))
    if "query_norm" in p:
      q, k = (np_norm(y) * p[name]["scale"] + p[name]["bias"]
              for y, name in ((q, "query_norm"), (k, "key_norm")))
    if rope:
      q, k = np_rotate(q, grid), np_rotate(k, grid)
    w = np.exp(q @ k.T / np.sqrt(q.shape[1]))
    out = out + w / w.sum(1, keepdims=True) @ v @ p["out"]["kernel"][h]
  return out


def np_mlp(x, p, kind):
  if kind == "swiglu":
    gate, up = (np_dense(x, {name: a[..., i, :] for name, a in p["up"].items()}) for i in range(2))
    return np_dense(np_silu(gate) * up, p["down"])
  x = np_dense(x, p["up"])
  x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  return np_dense(x, p["down"])


def np_positions(grid, width):
  table = np.zeros((grid[0] * grid[1], width))
  for n in range(len(table)):
    for half, at in enumerate(reversed(divmod(n, grid[1]))):  # column, then row
      for i in range(width // 4):
        angle, start = at * 10_000 ** (-4 * i / width), half * width // 2 + i
        table[n, start], table[n, start + width // 4] = math.sin(angle), math.cos(angle)
  return table


def np_dit(x, t, label, p, model):
  """[h, w, c] -> [h, w, c or 2c]."""
  s, (rows, columns) = model.patch, (x.shape[0] // model.patch, x.shape[1] // model.patch)
  places = [(slice(r * s, r * s + s), slice(c * s, c * s + s))
            for r in range(rows) for c in range(columns)]
  c = np_dense(np_silu(np_dense(np_timestep(t), p["condition"]["time_in"])),
               p["condition"]["time_out"])
  if model.num_classes:
    c = c + p["condition"]["label"]["embedding"][label]
  c = np_silu(c)
  x = np_dense(np.array([x[place].ravel() for place in places]), p["embed"]["projection"])
  if model.positions == "sincos2d":
    x = x + np_positions((rows, columns), model.width)
  for i in range(model.depth):
    block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
    m = np_dense(c, block["modulation"]).reshape(6, -1)
    y = np_norm(x) * (1 + m[1]) + m[0]
    x = x + m[2] * np_attention(y, block["attention"], (rows, columns), model.rope)
    x = x + m[5] * np_mlp(np_norm(x) * (1 + m[4]) + m[3], block["mlp"], model.mlp)
  m = np_dense(c, p["final"]["modulation"]).reshape(2, -1)
  x = np_dense(np_norm(x) * (1 + m[1]) + m[0], p["final"]["projection"])
  out = np.zeros((rows * s, columns * s, x.shape[1] // s**2))
  for place, patch in zip(places, x):
    out[place] = patch.reshape(s, s, -1)
  return out


# --- Tests ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [
  {}, {"learn_sigma": True}, {"num_classes": 0}, {"qk_norm": True, "mlp": "swiglu"},
  {"rope": True, "positions": "none"}, {"mlp_dim": 8, "rope": True, "qk_norm": True}])
def test_dit(fields):
  model = dit.make(**{**TINY, "num_classes": 5, **fields})
  x = normal(2, 8, 12, 3)
  params = random_params(0.15, model, x, TIMES, LABELS)
  y = jax.jit(lambda p, *args: model.apply({"params": p}, *args))(params, x, TIMES, LABELS)
  p = jax.tree.map(np.float64, params)
  expected = [np_dit(*example, p, model) for example in zip(np.float64(x), TIMES, LABELS)]
  np.testing.assert_allclose(y, expected, atol=2e-4, rtol=2e-4)  # time 870 alone rounds by 3e-5
  chex.assert_shape(y, (2, 8, 12, 6 if model.learn_sigma else 3))


@pytest.mark.parametrize("t,atol", [(0.0, 0), (0.3, 2e-7), (7.25, 2e-6), (999.0, 1e-4)])
def test_timestep_features(t, atol):
  y = dit.timestep_features(jnp.full(1, t))
  np.testing.assert_allclose(y[0], np_timestep(t), atol=atol)
  np.testing.assert_allclose(dit.timestep_features(jnp.full(1, t), 32)[0], np_timestep(t, 32),
                             atol=atol)


def test_rotary_products_depend_on_the_difference_of_places_alone():
  grid, d = (4, 5), 8
  rotate = relative.rope(grid, d)
  q, k = (np.broadcast_to(normal(1, 1, 2, d, seed=s), (1, 20, 2, d)) for s in (2, 3))
  product = np.einsum("bqkd,bnkd->qnk", rotate(jnp.asarray(q)), rotate(jnp.asarray(k)))
  seen = {}
  for a in range(20):
    for b in range(20):
      shift = (b // 5 - a // 5, b % 5 - a % 5)
      np.testing.assert_allclose(product[a, b], seen.setdefault(shift, product[a, b]), atol=1e-5)
  values = np.array([value[0] for value in seen.values()])
  assert len(seen) == 7 * 9 and np.abs(values - values[:, None])[~np.eye(63, dtype=bool)].min() > 0
  np.testing.assert_allclose(seen[0, 0], np.sum(q * k, -1)[0, 0], atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"rope": True, "mlp": "swiglu", "qk_norm": True}])
def test_a_new_model_is_the_identity_and_says_zero(fields):
  model = dit.make(**TINY, num_classes=5, **fields)
  x = normal(2, 8, 12, 3)
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), x, TIMES, LABELS)
  np.testing.assert_array_equal(y, np.zeros_like(x))
  params = variables["params"]
  tokens, c = normal(2, 6, 16), normal(2, 16, seed=2)
  block = dit.Block(2, model.mlp_dim, model.mlp, model.qk_norm)
  run = jax.jit(lambda p: block.apply({"params": p}, tokens, c))
  first = jax.tree.map(lambda a: np.asarray(a[0]), params["blocks"])
  np.testing.assert_array_equal(run(first), tokens)
  first["modulation"]["bias"] = np.ones(96, np.float32)
  assert np.abs(run(first) - tokens).max() > 0.1


def test_initial_parameters():
  model = dit.make(**{**TINY, "width": 64}, num_classes=5)
  params = jax.jit(model.init)(jax.random.key(0), normal(2, 8, 12, 3), TIMES, LABELS)["params"]
  qkv, condition = np.asarray(params["blocks"]["attention"]["qkv_kernel"]), params["condition"]
  np.testing.assert_allclose(qkv.std((1, 2, 3, 4)), np.sqrt(2 / (64 + 3 * 64)), rtol=0.05)
  assert np.abs(qkv[0] - qkv[1]).max() > 0.1  # each layer has its own draw
  patch = params["embed"]["projection"]["kernel"]
  np.testing.assert_allclose(patch.std(), np.sqrt(2 / (48 + 64)), rtol=0.05)
  for kernel in (condition["time_in"]["kernel"], condition["time_out"]["kernel"],
                 condition["label"]["embedding"]):
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)


def test_the_null_label_is_a_row_of_its_own():
  model = dit.make(**TINY, num_classes=5)
  x, t = np.repeat(normal(1, 8, 12, 3), 7, axis=0), np.full(7, 10.0, np.float32)
  params = random_params(0.15, model, x, t)
  run = jax.jit(lambda label: model.apply({"params": params}, x, t, label))
  y = np.asarray(run(np.arange(7)))  # five classes, null, and one that has no row
  for i in range(6):
    assert all(np.abs(y[i] - y[j]).max() > 0.01 for j in range(i))
  assert np.isnan(y[6]).all()
  np.testing.assert_allclose(run(None), np.broadcast_to(y[5], y.shape), atol=1e-5)
  unconditional = dit.make(**TINY)
  del params["condition"]["label"]
  run = jax.jit(lambda label: unconditional.apply({"params": params}, x, t, label))
  np.testing.assert_array_equal(run(None), run(np.arange(7)))
  chex.assert_trees_all_equal_shapes(params, random_params(0.15, unconditional, x, t))


@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_are_what_they_say(scan):
  """That they change no number is in test_reference_dit.py."""
  x, flops = normal(2, 8, 12, 3), {}
  for remat in ("none", "dots", "full"):
    model = dit.make(**TINY, num_classes=5, scan=scan, remat=remat, rope=True)
    params = random_params(0.15, model, x, TIMES)
    grad = jax.grad(lambda p, m=model: m.apply({"params": p}, x, TIMES, LABELS).sum())
    assert ("scan[" in str(jax.make_jaxpr(grad)(params))) == scan
    flops[remat] = count_flops(grad, params)
  assert flops["none"] < flops["dots"] < flops["full"]


@pytest.mark.parametrize("scan", suite([False, True], 1))
def test_compute_type_is_not_the_parameters(scan):
  x = normal(2, 8, 12, 3)
  model = dit.make(**TINY, num_classes=5, rope=True, qk_norm=True, mlp="swiglu", scan=scan)
  params = random_params(0.15, model, x, TIMES)
  half = model.clone(dtype=jnp.bfloat16)
  variables = jax.eval_shape(half.init, jax.random.key(0), x, TIMES)
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  y, expected = (jax.jit(lambda p, m=m: m.apply({"params": p}, x, TIMES, LABELS))(params)
                 for m in (half, model))
  assert y.dtype == jnp.float32
  assert 0 < np.abs(y - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("mlp", suite(["gelu", "swiglu"], 1))
def test_on_a_mesh(mlp):
  """Heads and hidden features are split by the trainer's rules, and no number changes."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model, x = dit.make(**TINY, num_classes=5, mlp=mlp, rope=True), normal(8, 8, 12, 3)
  t, label = np.linspace(0, 999, 8, dtype=np.float32), np.arange(8) % 6
  params = random_params(0.15, model, x, t)
  split = {path for path, _, spec in sharding.layout(params, mesh) if "tensor" in spec}
  assert split == {f"blocks/{name}" for name in (
    "attention/qkv_kernel", "attention/qkv_bias", "attention/out/kernel", "mlp/up/kernel",
    "mlp/up/bias", "mlp/down/kernel")}
  run = jax.jit(lambda p, batch: model.apply({"params": p}, *batch))
  expected = run(params, (x, t, label))
  placed = jax.device_put(params, sharding.shard_state(params, mesh))
  batch = jax.device_put((x, t, label), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    y = run(placed, batch)
  np.testing.assert_allclose(y, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("variant,published", [  # of latents [32, 32, 4], 2212.09748's appendix
  ("S/8", 33), ("S/4", 33), ("S/2", 33), ("B/8", 131), ("B/4", 130), ("B/2", 130), ("L/8", 459),
  ("L/4", 458), ("L/2", 458), ("XL/8", 676), ("XL/4", 675), ("XL/2", 675)])
def test_parameter_count(variant, published):
  model = dit.make(variant=variant, image_size=32, channels=4, num_classes=1000, learn_sigma=True,
                   scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  d, pixels = model.width, model.patch**2
  block = 4 * d * (d + 1) + 4 * d * (d + 1) + (4 * d + 1) * d + 6 * d * (d + 1)
  condition = 257 * d + d * (d + 1) + 1001 * d
  assert count == ((4 * pixels + 1) * d + condition + model.depth * block + 2 * d * (d + 1)
                   + 8 * pixels * (d + 1))
  assert round(count / 1e6) == published
  if variant == "XL/2":  # the number that is printed everywhere, with the fixed positions
    assert count + 16**2 * d == 675_129_632


def test_swiglu_has_as_many_parameters():
  for size in dit.SIZES:
    models = [dit.make(variant=f"{size}/2", image_size=32, channels=4, scan=True, mlp=mlp)
              for mlp in dit.MLPS]
    counts = [sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      m.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)))) for m in models]
    np.testing.assert_allclose(counts[0], counts[1], rtol=2e-3)


@pytest.mark.parametrize("fields,words", [
  ({"variant": "XL/3/1"}, r"model.variant = 'XL/3/1'.*did you mean 'XL/"),
  ({"variant": "M/2"}, "one of S, B, L, XL"),
  ({"patch": 5}, "model.patch = 5 does not divide the image size 8x12"),
  ({"heads": 3}, "model.heads = 3 does not divide model.width = 16"),
  ({"heads": 8, "rope": True}, "model.rope needs heads of a multiple of 4 features.*is 2"),
  ({"variant": "", "patch": 4}, "model: give variant .* or all of width, depth, heads")])
def test_bad_sizes(fields, words):
  sizes = {"image_size": (8, 12), "channels": 3} if "variant" in fields else TINY
  with pytest.raises(ValueError, match=words):
    dit.make(**{**sizes, **fields})
