"""Each evaluator on a fake context, against float64 NumPy written another way."""

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from evaluators import checks, classification, few_shot, knn, linear_probe, reconstruction


class Info(NamedTuple):
  num_classes: int | None
  class_names: tuple = ()


class FakeContext(NamedTuple):
  """The trainer's context with stored outputs: {(prediction, params, split): array}."""
  outputs: dict = {}
  batches: dict = {}  # split -> {key: array}
  info: Info = Info(3)
  eval_split: str = "test"
  train_split: str = "train"
  to_pixels: Any = lambda x: x * 0.25 + 0.5
  figures: Path = Path("unused")
  step: int = 7
  final: bool = False
  seed: int = 0
  reconstruct: Any = None

  def collect(self, name, split, *keys, params="trained", limit=None, first=None):
    out = self.outputs[name, params, split]
    return out[:limit][:first], {key: self.batches[split][key][:limit][:first] for key in keys}

  def predict(self, name, batch, rng=None):
    assert name == "reconstruct" and rng is not None
    return self.reconstruct(**batch)


def clusters(classes=8, train=160, test=80, d=16, spread=0.1, seed=0):
  """Well separated classes around random directions, with useless untrained features."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(classes, d))
  outputs, batches = {}, {}
  for split, n in (("train", train), ("test", test)):
    labels = np.arange(n, dtype=np.int32) % classes
    x = centres[labels] + spread * rng.normal(size=(n, d))
    outputs["features", "trained", split] = x.astype(np.float32)
    outputs["features", "untrained", split] = rng.normal(size=(n, d)).astype(np.float32)
    outputs["pixels", None, split] = x[:, :3].astype(np.float32)
    batches[split] = {"label": labels}
  return FakeContext(outputs, batches, Info(classes))


# classification

def test_topk_counts_like_a_sort():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (200, 9)).astype(np.float32)  # many ties
  labels = rng.integers(0, 9, 200)
  hits = {1: 0, 5: 0}
  for row, label in zip(scores, labels):
    ranked = sorted(range(9), key=lambda c: (-row[c], c))
    for k in hits:
      hits[k] += label in ranked[:k]
  assert checks.topk(scores, labels) == {"top1": hits[1] / 200, "top5": hits[5] / 200}


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_topk_gives_no_credit_for_broken_scores(bad):
  metrics = checks.topk(np.full((12, 6), bad), np.arange(12) % 6)
  assert metrics == {"top1": 0.0, "top5": 0.0}


def test_topk_of_five_classes_has_no_top5():
  assert checks.topk(np.eye(5), np.arange(5)) == {"top1": 1.0}


def test_classification_against_float64():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 7)).astype(np.float32) * 4
  labels = rng.integers(0, 7, 50).astype(np.int32)
  context = FakeContext(
      {("logits", "trained", "test"): logits}, {"test": {"label": labels}}, Info(7))
  metrics = classification.evaluate(context)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(1, keepdims=True)
  loss = np.mean([-np.log(p[i, y]) for i, y in enumerate(labels)])
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["top1"], np.mean(p.argmax(1) == labels))
  assert metrics["top1"] < metrics["top5"] < 1


def test_confusion_and_its_figure(tmp_path, monkeypatch):
  labels, predicted = np.repeat([0, 1, 2], [6, 5, 4]), np.r_[np.zeros(3, int), [1, 1, 2],
                                                              np.ones(5, int), [0, 0, 0, 0]]
  counts = classification.confusion(labels, predicted, 3)
  np.testing.assert_array_equal(counts, [[3, 2, 1], [0, 5, 0], [4, 0, 0]])
  figures, sheet = [], classification.sheet
  monkeypatch.setattr(classification, "sheet", lambda *a: figures.append(sheet(*a)) or figures[0])
  context = FakeContext({("logits", "trained", "test"): np.eye(3, dtype=np.float32)[predicted]},
                        {"test": {"label": labels.astype(np.int32)}}, Info(3, ("$", "b", "$$")),
                        figures=tmp_path / "figures", final=True)
  classification.evaluate(context)
  matrix, bars = figures[0].axes[:2]
  np.testing.assert_allclose(matrix.images[0].get_array(), counts / [[6], [5], [4]])
  assert [text.get_text().strip() for text in bars.texts] == [
    "$$ taken for $: 4 of 4", "$ taken for b: 2 of 6", "$ taken for $$: 1 of 6"]
  assert imread(context.figures / "confusion_step00000007.png").shape[1] > 1000
  classification.evaluate(context._replace(final=False, figures=tmp_path / "none"))
  assert not (tmp_path / "none").exists()
  many = sheet(np.arange(150**2).reshape(150, 150) % 7, range(150), 9, "")
  assert not many.axes[0].images and len(many.axes[1].texts) == 9


# few-shot

@pytest.mark.parametrize("m", [6, 40])
def test_few_shot_fit_is_the_minimum(m):
  rng = np.random.default_rng(0)
  x, labels = rng.normal(size=(m, 12)) + 3, np.arange(m) % 4
  kernel, bias = few_shot.fit(x, labels, 4, 0.3)
  # The same as least squares with rows sqrt(penalty) w = 0 added; the bias has none.
  rows = np.concatenate([np.c_[x, np.ones(m)], np.sqrt(0.3 * 12) * np.eye(12, 13)])
  y = np.concatenate([2 * np.eye(4)[labels] - 1, np.zeros((12, 4))])
  expected = np.linalg.lstsq(rows, y, rcond=None)[0]
  np.testing.assert_allclose(np.r_[kernel, bias[None]], expected, atol=1e-9)


def test_few_shot_draws_shots_by_seed_and_scores(monkeypatch):
  context, fitted = clusters(spread=0.6), []
  monkeypatch.setattr(few_shot, "fit", lambda x, *a, fit=few_shot.fit:
                      fitted.append((x, a[0])) or fit(x, *a))
  metrics = few_shot.evaluate(context, shots=(2, 5), draws=3, baselines=("untrained",))
  assert sorted(metrics) == sorted(f"{prefix}{n}shot/{key}" for prefix in ("", "untrained/")
                                   for n in (2, 5) for key in ("top1", "top1_std"))
  assert metrics["untrained/5shot/top1"] < 0.35 < 0.8 < metrics["2shot/top1"]
  assert metrics["2shot/top1"] <= metrics["5shot/top1"]
  for i, (x, labels) in enumerate(fitted):
    np.testing.assert_array_equal(np.bincount(labels), [(2, 5)[i % 2]] * 8)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(x.std(0), 1)
  assert few_shot.evaluate(context, shots=(5,), draws=3)["5shot/top1"] == metrics["5shot/top1"]
  few_shot.evaluate(context._replace(seed=1), shots=(2,), draws=3)
  drawn = [x for x, labels in fitted if len(labels) == 16]  # trained, untrained, the other seed
  assert len({x[:, :1].tobytes() for x in drawn}) == len(drawn) == 9
  x = context.outputs["features", "trained", "test"]  # one point is one class
  assert few_shot.evaluate(context._replace(outputs={
    **context.outputs, ("features", "trained", "test"): x * 0 + x[:1]}), draws=2, shots=(2,))[
      "2shot/top1"] == 1 / 8


# knn

@pytest.mark.parametrize("block", [1, 130, 2**26])
@pytest.mark.parametrize("k,temperature", [(1, 0.07), (5, 0.07), (5, 1.0), (40, 0.2)])
def test_votes_against_float64(k, temperature, block):
  rng = np.random.default_rng(0)
  bank, queries = rng.normal(size=(40, 6)), rng.normal(size=(11, 6))
  labels = rng.integers(0, 4, 40)
  expected = np.zeros((11, 4))
  for row, q in zip(expected, queries):
    s = sorted(((b @ q / np.sqrt((b @ b) * (q @ q)), y) for b, y in zip(bank, labels)),
               reverse=True)[:k]
    for similarity, y in s:
      row[y] += np.exp((similarity - s[0][0]) / temperature)
  votes = knn.votes(bank.astype(np.float32), labels, queries.astype(np.float32), temperature,
                    k=k, classes=4, block=block)
  chex.assert_shape(votes, (11, 4))
  np.testing.assert_allclose(np.exp(votes), expected, rtol=1e-4)


def test_knn_weights_decide_and_length_does_not():
  def unit(degrees):
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]
  bank = np.float32([unit(5), unit(40), unit(-40)]) * np.float32([[100], [1], [1]])
  labels, query = np.int32([0, 1, 1]), np.float32([[1, 0]])
  for temperature, winner in ((0.07, 0), (10.0, 1)):  # one near neighbour against two far ones
    votes = knn.votes(bank, labels, query, temperature, k=3, classes=3)
    assert np.argmax(votes) == winner
    assert votes[0, 2] == -np.inf


def test_knn_metrics_and_baselines():
  context = clusters()
  metrics = knn.evaluate(context, k=5, baselines=("untrained", "pixels"))
  assert sorted(metrics) == sorted(
      p + m for p in ("", "untrained/", "pixels/") for m in ("top1", "top5"))
  assert metrics["top1"] == 1.0
  assert metrics["untrained/top1"] < 0.35 < metrics["pixels/top1"]
  assert sorted(knn.evaluate(context, k=5)) == ["top1", "top5"]


def test_knn_limit_shortens_the_bank_only():
  context = clusters()
  # The first three examples hold classes 0, 1 and 2 of 8.
  assert knn.evaluate(context, k=1, limit=3)["top1"] == 3 / 8


# linear probe

def test_fit_reaches_the_stationary_point():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(90, 5)), rng.integers(0, 4, 90)
  weights, l2 = rng.uniform(size=90) / 90, 0.03
  weights[:10] = 0  # left out
  start = {"kernel": jnp.ones((5, 4)), "bias": jnp.zeros(4)}
  params, norm = linear_probe.fit(start, jnp.asarray(x, jnp.float32), y,
                                  jnp.asarray(weights, jnp.float32), l2, 500, 1e-6)
  kernel, bias = np.float64(params["kernel"]), np.float64(params["bias"])
  kernel_grad, bias_grad = l2 * kernel, np.zeros(4)
  for xi, yi, wi in zip(x, y, weights):  # d CE / d logits = softmax - onehot
    p = np.exp(xi @ kernel + bias)
    residual = wi * (p / p.sum() - np.eye(4)[yi])
    kernel_grad += np.outer(xi, residual)
    bias_grad += residual
  assert norm < 1e-5
  np.testing.assert_allclose(kernel_grad, 0, atol=2e-6)
  np.testing.assert_allclose(bias_grad, 0, atol=2e-6)
  assert np.abs(kernel).max() > 0.05  # not merely shrunk to zero


def test_fit_stops_at_max_iters():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 3)), jnp.float32)
  start = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
  args = (start, x, np.arange(30) % 2, jnp.ones(30) / 30, 1e-3)
  assert linear_probe.fit(*args, 1, 1e-5)[1] > 10 * linear_probe.fit(*args, 100, 1e-5)[1]


def test_linear_probe_separates_and_reports_baselines():
  metrics = linear_probe.evaluate(clusters(), l2=(1e-1, 1e-3), baselines=("untrained",))
  assert metrics["top1"] == metrics["top5"] == 1.0
  assert metrics["untrained/top1"] < 0.4
  assert metrics["l2"] in (1e-1, 1e-3) and metrics["untrained/l2"] in (1e-1, 1e-3)


def test_linear_probe_of_permuted_labels_is_chance():
  context = clusters(train=800, test=800)
  rng = np.random.default_rng(1)
  for split in ("train", "test"):
    context.batches[split]["label"] = rng.permutation(context.batches[split]["label"])
  assert abs(linear_probe.evaluate(context)["top1"] - 1 / 8) < 0.05  # 4 standard errors


def test_linear_probe_ignores_the_scale_and_offset_of_features():
  context = clusters(spread=1.0)
  expected = linear_probe.evaluate(context)
  assert 0.3 < expected["top1"] < 1.0
  for split in ("train", "test"):
    x = context.outputs["features", "trained", split]
    x = np.concatenate([x * np.float32(1e3) + 50, np.full_like(x[:, :1], 0.1)], 1)
    context.outputs["features", "trained", split] = x  # the last feature is constant
  metrics = linear_probe.evaluate(context)
  np.testing.assert_allclose(metrics["top1"], expected["top1"], atol=1 / 80)
  assert metrics["l2"] == expected["l2"]


def test_linear_probe_chooses_l2_without_the_evaluation_split():
  context = clusters(spread=2.0)
  chosen = linear_probe.evaluate(context, l2=(100.0, 1e-1, 1e-5))
  context.batches["test"]["label"] = (context.batches["test"]["label"] + 1) % 8
  shifted = linear_probe.evaluate(context, l2=(100.0, 1e-1, 1e-5))
  assert shifted["l2"] == chosen["l2"] and shifted["top1"] < chosen["top1"]


def test_linear_probe_chooses_the_strength_that_generalises():
  # A quarter of the labels is wrong: a weak penalty fits those, a huge one leaves only the bias.
  rng = np.random.default_rng(0)
  context = clusters(classes=2, train=600, test=400)
  for split, batch in context.batches.items():
    true = batch["label"]
    x = rng.normal(size=(len(true), 200)) + 0.2 * (2 * true[:, None] - 1)
    context.outputs["features", "trained", split] = x.astype(np.float32)
    batch["label"] = np.where(rng.uniform(size=len(true)) < 0.25, 1 - true, true)
  metrics = linear_probe.evaluate(context, l2=(1e-6, 1.0, 1e3), holdout=0.5)
  assert metrics["l2"] == 1.0
  for worse in (1e-6, 1e3):
    assert metrics["top1"] > linear_probe.evaluate(context, l2=(worse,))["top1"] + 0.04


def test_linear_probe_refits_to_all_of_training():
  context = clusters(spread=2.0)
  few, many = (linear_probe.evaluate(context, l2=(1e-2,), holdout=h)["top1"] for h in (0.1, 0.9))
  np.testing.assert_allclose(few, many, atol=1 / 80)  # one convex problem, two starting points


# reconstruction

def masked_context(tmp_path, channels, offset, **extra):
  """Two 8 x 12 images of 4 x 4 patches; predictions off by `offset` where removed, 9 elsewhere."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 8, 12, channels)).astype(np.uint8)
  mean, std = np.linspace(0.4, 0.5, channels), np.linspace(0.2, 0.3, channels)
  normalised = ((images / 255 - mean) / std).astype(np.float32)
  fixed = np.float32([[1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]])

  def reconstruct(image, keep=None):
    np.testing.assert_array_equal(image, normalised[:2])
    x, out, mask = image, image + 9, np.copy(fixed)
    if keep is not None:
      mask[:] = 1
      np.put_along_axis(mask, keep, 0, axis=1)
    for i, row in enumerate(mask):
      for n, removed in enumerate(row):
        top, left = 4 * (n // 3), 4 * (n % 3)
        window = np.s_[i, top:top + 4, left:left + 4]
        if removed:
          out[window] = x[window] + offset / std
    return {"image": out, "mask": mask, **extra}

  context = FakeContext({("pixels", None, "test"): normalised.reshape(3, -1)},
                        {"test": {"image": images}}, to_pixels=lambda x: x * std + mean,
                        figures=tmp_path / "figures", reconstruct=reconstruct)
  return context, images[:2] / 255, fixed


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_error_and_figure(tmp_path, monkeypatch, channels):
  context, images, mask = masked_context(tmp_path, channels, offset=0.1)
  drawn = []
  monkeypatch.setattr(reconstruction, "grid", lambda *a, grid=reconstruction.grid:
                      drawn.append((a, grid(*a))) or drawn[0][1])
  metrics = reconstruction.evaluate(context, examples=2)
  np.testing.assert_allclose(metrics["mse"], 0.01, rtol=1e-4)
  np.testing.assert_allclose(metrics["psnr"], 20.0, rtol=1e-4)

  (columns, titles, caption), figure = drawn[0]
  assert "50%" in caption and "0.0100" in caption and "normalised" not in caption
  assert [axis.get_title() for axis in figure.axes] == [*titles] + [""] * 4
  original, masked, _, pasted = columns
  np.testing.assert_allclose(original, images, atol=1e-6)
  for i, n in np.ndindex(*mask.shape):
    window = np.s_[i, 4 * (n // 3):4 * (n // 3) + 4, 4 * (n % 3):4 * (n % 3) + 4]
    np.testing.assert_allclose(masked[window], 0.5 if mask[i, n] else images[window], atol=1e-6)
    np.testing.assert_allclose(pasted[window], images[window] + 0.1 * mask[i, n], atol=1e-6)
  for axis, image in zip(figure.axes, (c[0] for c in columns)):
    shown = np.asarray(axis.images[0].get_array()).reshape(image.shape)
    np.testing.assert_allclose(shown, np.clip(image, 0, 1))
    assert axis.images[0].get_clim() == (0, 1)  # or a faint image would be stretched

  picture = imread(tmp_path / "figures" / "reconstruction_step00000007.png")
  assert picture.shape[1] == 840 and picture[..., :3].std() > 0.1


def test_reconstruction_at_several_ratios(tmp_path, monkeypatch):
  context, images, _ = masked_context(tmp_path, 1, offset=0.1)
  drawn = []
  monkeypatch.setattr(reconstruction, "grid", lambda *a, grid=reconstruction.grid:
                      drawn.append(a) or grid(*a))
  metrics = reconstruction.evaluate(context, examples=2, ratios=(0.5, 0.8))
  for ratio in ("0.5", "0.8"):
    np.testing.assert_allclose(metrics[f"{ratio}/mse"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(metrics[f"{ratio}/psnr"], 20.0, rtol=1e-4)
  original, *rest = drawn[1][0]
  np.testing.assert_allclose(original, images, atol=1e-6)
  hidden = [np.abs(filled - images) > 0.05 for filled in rest[1::2]]
  assert [mask.mean() for mask in hidden] == [0.5, 5 / 6] and (hidden[0] <= hidden[1]).all()
  for masked, mask in zip(rest[::2], hidden):
    np.testing.assert_allclose(masked, np.where(mask, 0.5, images), atol=1e-6)
  assert imread(context.figures / "reconstruction_ratios_step00000007.png").std() > 0.1


def test_reconstruction_says_what_patch_normalised_targets_show(tmp_path, monkeypatch):
  captions = []
  monkeypatch.setattr(reconstruction, "grid", lambda *a, grid=reconstruction.grid:
                      captions.append(a[2]) or grid(*a))
  for flag in (True, False):
    context, _, _ = masked_context(tmp_path, 1, 0.1, norm_pix=np.full(2, flag))
    reconstruction.evaluate(context, examples=2)
  assert ["true patch's mean and variance" in caption for caption in captions] == [True, False]


# what a user may get wrong

@pytest.mark.parametrize("evaluator", [classification, few_shot, knn, linear_probe])
def test_without_labels(evaluator):
  name = evaluator.__name__.split(".")[-1]
  with pytest.raises(ValueError, match=f"evals.{name} needs labels"):
    evaluator.evaluate(FakeContext(info=Info(None)))


@pytest.mark.parametrize("evaluator,kwargs,message", [
    (knn, {"k": 0}, r"evals.knn.k=0 .* 1\.\.160"),
    (knn, {"k": 161}, r"evals.knn.k=161"),
    (knn, {"temperature": 0.0}, "evals.knn.temperature=0.0"),
    (knn, {"baselines": ("pixel",)}, "evals.knn.baselines: 'pixel' .* did you mean 'pixels'"),
    (linear_probe, {"l2": ()}, r"evals.linear_probe.l2=\(\)"),
    (linear_probe, {"l2": 0.1}, "evals.linear_probe.l2=0.1 must be a tuple"),
    (linear_probe, {"l2": (0.0, 1.0)}, "evals.linear_probe.l2="),
    (linear_probe, {"holdout": 1.0}, "evals.linear_probe.holdout=1.0"),
    (reconstruction, {"examples": 0}, "evals.reconstruction.examples = 0"),
    (reconstruction, {"ratios": (0.5, 1.0)}, r"evals.reconstruction.ratios=\(0.5, 1.0\)"),
    (classification, {"pairs": -1}, "evals.classification.pairs = -1"),
    (few_shot, {"shots": 5}, "evals.few_shot.shots=5 must be a tuple"),
    (few_shot, {"shots": (5, 21)}, "a class has only 20 of the 160"),
    (few_shot, {"draws": 1}, "evals.few_shot: draws=1"),
    (few_shot, {"l2": 0.0}, "l2=0.0"),
])
def test_bad_settings(evaluator, kwargs, message):
  with pytest.raises(ValueError, match=message):
    evaluator.evaluate(clusters(), **kwargs)


def test_features_must_be_vectors():
  context = clusters()
  context.outputs["tokens", "trained", "train"] = np.zeros((160, 4, 8))
  with pytest.raises(ValueError, match=r"evals.knn.features='tokens' .* \(160, 4, 8\)"):
    knn.evaluate(context, features="tokens")
