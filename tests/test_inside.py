"""Looking inside a network: each number against float64 NumPy written another way, and figures."""

from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from matplotlib.image import imread

from evaluators import inside, pictures
from methods import mae, moco, supervised
from models import mae as mae_network
from models import moco as moco_network
from models import positions, resnet, vit

VIT = dict(image_size=(8, 12), channels=3, patch=4, width=16, depth=2, heads=2, mlp_dim=24)


def images(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attention(*shape):
  weights = np.random.default_rng(0).uniform(0.1, 1, shape)
  return weights / weights.sum(-1, keepdims=True)


# --- Numbers --------------------------------------------------------------------------------------

def test_rollout_is_a_walk_through_the_blocks():
  weights = attention(2, 3, 4, 5, 5)
  rolled = inside.rollout(weights)
  chex.assert_shape(rolled, (2, 3, 5, 5))
  np.testing.assert_allclose(rolled.sum(-1), 1)
  for b, q in np.ndindex(2, 5):  # the other way round: from a token of the output to the input
    at = np.eye(5)[q]
    for block in (2, 1, 0):
      at = sum((at + at @ weights[b, block, head]) / 2 for head in range(4)) / 4
    np.testing.assert_allclose(rolled[b, 2, q], at)


def test_mean_distance_in_pixels():
  weights, expected = attention(2, 6, 6) * np.array([[[0.3]], [[1.0]]]), np.zeros(2)
  for b in range(2):
    for q in range(6):
      total = weights[b, q].sum()
      for key in range(6):
        rows, columns = q // 3 - key // 3, q % 3 - key % 3
        expected[b] += weights[b, q, key] / total * 4 * np.hypot(rows, columns) / 6
  np.testing.assert_allclose(inside.mean_distance(weights, (2, 3), 4), expected)
  assert inside.mean_distance(np.eye(6), (2, 3), 4) == 0


@pytest.mark.parametrize("m,d", [(40, 6), (4, 6)])
def test_principal_components(m, d):
  x = images(m, d) * np.arange(1, d + 1) + 5
  scores, components, share = inside.principal_components(x, 5)
  covariance = np.cov(np.float64(x).T, bias=True)
  values = np.sort(np.linalg.eigvalsh(covariance))[::-1][:5]
  np.testing.assert_allclose(share, values / np.trace(covariance), atol=1e-7)
  some = min(5, m - 1)
  np.testing.assert_allclose(covariance @ components[:some].T,
                             components[:some].T * values[:some], atol=1e-6 * values[0])
  np.testing.assert_allclose(np.linalg.norm(components[:some], axis=1), 1)
  np.testing.assert_allclose(scores.var(0), values, atol=1e-6 * values[0])
  np.testing.assert_allclose(scores, (x - x.mean(0, dtype=np.float64)) @ components.T, atol=1e-9)


def test_colours_and_differences_of_tokens():
  tokens = np.zeros((5, 6, 8), np.float32)
  tokens[..., :3] = images(6, 3) * 9                                         # of a place
  tokens[..., 3:6] = images(5, 1, 3, seed=1) * 9                             # of an image
  tokens[2, 4, 6] = 2.0                                                      # of a patch alone
  rgb = inside.differences(tokens)
  length = np.full((5, 6), 1 / 5 / 6)                                        # of what is left of it
  length[2], length[:, 4], length[2, 4] = 4 / 5 / 6, 5 / 6 / 5, 4 / 5 * 5 / 6
  expected = np.minimum(length / np.percentile(length, 95), 1)
  np.testing.assert_allclose(rgb.max(-1), expected, atol=1e-5)
  assert rgb.min() >= 0 and np.ptp(rgb[expected > 0.1], axis=-1).max() > 0.5  # in colour
  flat = inside.colours(tokens.reshape(30, 8))
  order = np.argsort(inside.principal_components(tokens.reshape(30, 8), 1)[0][:, 0])
  assert (np.diff(flat[order, 0]) >= 0).all() and flat[:, 0].min() == 0 and flat[:, 0].max() == 1


# --- What networks tell ---------------------------------------------------------------------------

def make(model, method=supervised, **fields):
  method = method.make(model, **fields)
  batch = {"image": images(2, 8, 12, 3)}
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  return method, params, extra, batch


@pytest.mark.parametrize("fields,shares", [
  (dict(pool="cls", registers=2), [1] + [0] * 8), (dict(pool="mean", class_token=True),
                                                   [0] + [1 / 6] * 6)])
def test_predictions_of_a_vit(fields, shares):
  model = vit.make(**VIT, num_classes=3, **fields)
  method, params, extra, batch = make(model)
  told = {name: jax.jit(method.predict[name])(params, extra, batch, None)
          for name in ("attention", "attention_layers", "filters", "positions")}
  layers = told["attention_layers"]
  np.testing.assert_allclose(layers["weights"][:, -1], told["attention"], atol=1e-6)
  np.testing.assert_allclose(layers["weights"].sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(layers["shares"], [shares] * 2, rtol=1e-6)
  assert list(layers["prefix"]) == [len(shares) - 6] * 2
  np.testing.assert_array_equal(told["positions"], params["position"]["table"])
  embedded = vit.PatchEmbed(16).apply({"params": params["embed"]},
                                      vit.patchify(batch["image"], 4))
  window = batch["image"][1, 4:8, 4:8]                                       # patch 4 of 2 x 3
  np.testing.assert_allclose(np.einsum("dpqc,pqc->d", told["filters"], window), embedded[1, 4],
                             atol=1e-5)


def test_predictions_where_there_is_less_to_tell():
  fixed = supervised.make(vit.make(**VIT, num_classes=3, positions="sincos2d"))
  np.testing.assert_allclose(fixed.predict["positions"]({}, {}, {}, None),
                             positions.FIXED["sincos2d"]((2, 3), 16), atol=1e-6)
  assert "positions" not in supervised.make(
    vit.make(**VIT, num_classes=3, positions="none")).predict
  model = moco_network.make(backbone="resnet", variant="18", stem="small", depths=(1,), widths=(4,),
                            image_size=(8, 12), channels=3, dim=4)
  method, params, extra, batch = make(model, moco, batch_size=2, total_steps=1, queue_size=2)
  assert not {"attention", "attention_layers", "positions"} & set(method.predict)
  kernel = params["backbone"]["stem"]["kernel"]
  np.testing.assert_array_equal(method.predict["filters"](params, extra, {}, None)[2],
                                kernel[..., 2])


def test_an_mae_reconstructs_from_the_patches_it_is_given():
  method, params, extra, batch = make(
    mae_network.make(**VIT, decoder_width=16, decoder_depth=1, decoder_heads=2), mae)
  keep = np.array([[5, 0], [1, 3]])
  predict = jax.jit(method.predict["reconstruct"])
  out = predict(params, extra, {**batch, "keep": keep}, jax.random.key(0))
  np.testing.assert_array_equal(out["mask"], [[0, 1, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1]])
  noise = np.float32([[0.1, 1, 1, 1, 1, 0], [1, 0, 1, 0.1, 1, 1]])
  two_stay = mae.make(mae_network.make(**VIT, decoder_width=16, decoder_depth=1, decoder_heads=2),
                      mask_ratio=0.6).predict["reconstruct"]
  same = jax.jit(two_stay)(params, extra, {**batch, "noise": noise}, jax.random.key(0))
  np.testing.assert_allclose(out["pred"], same["pred"], atol=1e-5)
  for patch, seen in ((0, True), (1, False)):  # of the first image
    changed = batch["image"].copy()
    changed[0, :4, 4 * patch:4 * patch + 4] += 1
    pred = predict(params, extra, {"image": changed, "keep": keep}, jax.random.key(0))["pred"]
    assert (np.abs(pred[0] - out["pred"][0]).max() > 1e-4) == seen


# --- Figures --------------------------------------------------------------------------------------

def make_context(tmp_path, model, size=(8, 12), n=12, classes=3):
  """Random images of both splits, through a real network."""
  method = supervised.make(model)
  labels = np.arange(n, dtype=np.int32) % 3
  data = {split: {"image": images(n, *size, 3, seed=seed), "label": labels}
          for split, seed in (("train", 1), ("test", 2))}
  params, extra = jax.jit(method.init)(jax.random.key(0), data["train"])
  compiled = {name: jax.jit(function) for name, function in method.predict.items()}

  def predict(name, batch, rng=None):
    return jax.tree.map(np.asarray, compiled[name](params, extra, batch, rng))

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    batch = {key: x[:limit][:first] for key, x in data[split].items()}
    out = batch["image"].reshape(len(batch["image"]), -1) if name == "pixels" else predict(
      name, {"image": batch["image"]})
    return out, {key: batch[key] for key in keys}

  return SimpleNamespace(
    collect=collect, predict=predict, predictions=frozenset(method.predict), figures=tmp_path,
    info=SimpleNamespace(num_classes=classes, class_names=("$", "a b", "c")), step=7, seed=0,
    train_split="train", eval_split="test", to_pixels=lambda x: np.asarray(x) * 0.2 + 0.5)


def drawn(monkeypatch, function):
  calls, original = [], getattr(inside, function)
  monkeypatch.setattr(inside, function, lambda *a: calls.append(a) or original(*a))
  return calls


def test_all_figures_of_a_vit(tmp_path, monkeypatch):
  context = make_context(tmp_path, vit.make(**VIT, num_classes=3, pool="mean", registers=1))
  distances = drawn(monkeypatch, "distance_figure")
  found = drawn(monkeypatch, "neighbours_figure")
  heats, original = [], pictures.heat
  monkeypatch.setattr(pictures, "heat", lambda *a: heats.append(a) or original(*a))
  assert inside.evaluate(context, examples=3, images=11, neighbours=4) == {}
  for name in inside.NEEDS:
    picture = imread(tmp_path / f"inside_{name}_step00000007.png")[..., :3]
    assert picture.std() > 0.05 and picture.shape[1] > 500, name
  assert len(list(tmp_path.iterdir())) == len(inside.NEEDS)

  test = context.collect("pixels", "test", "image", "label", limit=11)[1]
  weights = np.float64(context.predict("attention_layers", test)["weights"])  # 11 2 2 7 7
  chosen = [0, 5, 10]
  np.testing.assert_allclose(heats[0][0], np.clip(test["image"][chosen] * 0.2 + 0.5, 0, 1))
  np.testing.assert_allclose(heats[0][1].reshape(3, 2, 6), weights[chosen, 1, :, 1:, 1:].mean(2),
                             atol=1e-6)
  rolled = inside.rollout(weights[chosen])[:, :, 1:, 1:].mean(2)
  np.testing.assert_allclose(heats[1][1].reshape(3, 2, 6), rolled, atol=1e-6)
  expected = inside.mean_distance(weights[..., 1:, 1:], (2, 3), 4).mean(0)
  np.testing.assert_allclose(distances[0][0], expected, rtol=1e-5)
  steps = np.array([(r, c) for r in range(2) for c in range(3)]) * 4.0
  uniform = np.mean([np.hypot(*(p - q)) for p in steps for q in steps])
  np.testing.assert_allclose(distances[0][1], uniform)

  train, bank = context.collect("features", "train", "label")
  queries = context.predict("features", test)[chosen]
  cosine = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in train] for a in queries])
  best = np.argsort(-cosine, axis=1)[:, :4]
  _, names, _, found_names, right, scores, _ = found[0]
  np.testing.assert_allclose(scores, np.take_along_axis(cosine, best, 1), rtol=1e-4)
  np.testing.assert_array_equal(right, bank["label"][best] == test["label"][chosen][:, None])
  assert list(names) == ["$", "c", "a b"]
  assert found_names[0, 0] == ("$", "a b", "c")[bank["label"][best[0, 0]]]


def test_figures_of_a_resnet_and_without_labels(tmp_path):
  model = resnet.make(image_size=(33, 33), channels=3, num_classes=3, stem="small", depths=(1, 1),
                      widths=(4, 8), variant="18")
  context = make_context(tmp_path, model, size=(33, 33))  # no multiple of the strides
  context.info = SimpleNamespace(num_classes=0, class_names=())
  inside.evaluate(context, examples=2)
  assert {path.name.split("_")[1] for path in tmp_path.iterdir()} == {
    "filters", "tokens", "neighbours"}
  with pytest.raises(ValueError, match="figures: 'rollout' needs the prediction"):
    inside.evaluate(context, figures=("filters", "rollout"))
  with pytest.raises(ValueError, match="'token' is not one of .* did you mean 'tokens'"):
    inside.evaluate(context, figures="token")
  with pytest.raises(ValueError, match="evals.inside.examples = 0"):
    inside.evaluate(context, examples=0)
  context.predictions = frozenset(["sample"])
  with pytest.raises(ValueError, match="none of its figures applies"):
    inside.evaluate(context)


@pytest.mark.parametrize("grid", [(3, 5), (30, 30)])
def test_positions_figure_shows_each_similarity(grid, monkeypatch):
  cells = []
  monkeypatch.setattr(pictures, "mosaic", lambda *a, mosaic=pictures.mosaic, **k:
                      cells.append(a[0]) or mosaic(*a, **k))
  table = images(grid[0] * grid[1], 6)
  inside.positions_figure(table, grid, "")
  rows, columns = cells[0].shape[:2]
  assert (rows, columns) == (grid if grid == (3, 5) else (15, 15))
  start, step = (0, 1) if grid == (3, 5) else (1, 2)
  own = (start + step * 1, start + step * 2)
  high, wide = (side // n for side, n in zip(cells[0].shape[2:4], grid))
  tile = cells[0][1, 2, ::high, ::wide]                                      # h w 3, in viridis
  assert np.unravel_index(tile.sum(-1).argmax(), grid) == own                # itself is brightest
