"""Retrieval against float64 sorting, its ties against all orders, its memory, its figures."""

import itertools
import math
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from evaluators import retrieval

WIDTH = 24


def encode(texts, length=48):
  return np.array([list(text.encode().ljust(length, b"\0")) for text in texts], np.int32)


def decode(ids):
  return bytes(ids.astype(np.uint8)).rstrip(b"\0").decode()


def vector(text):
  """A direction for each text, as a trained tower would give one."""
  x = np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)
  return x / np.linalg.norm(x)


def random_unit(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def sorted_recall(scores, right, ks):
  """By sorting; right is bool [Q, C]."""
  order = np.argsort(-scores, axis=1)
  ranked = np.take_along_axis(right, order, axis=1)
  return {k: np.mean(ranked[:, :k].any(1)) for k in ks}


def fake_context(tmp_path, captions, noise, seed=0, channels=1, **fields):
  """A context whose image i lies near the last of the texts `captions[i]`.

  The padding repeats that text, so that an evaluator that takes padding for captions finds it.
  """
  rng = np.random.default_rng(seed)
  n, most = len(captions), max(map(len, captions))
  images = np.array([vector(own[-1]) for own in captions]) + noise * rng.normal(size=(n, WIDTH))
  images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
  ids = np.stack([encode([*own, *[own[-1]] * (most - len(own))]) for own in captions])
  batch = {"captions": ids, "num_captions": np.array([len(own) for own in captions], np.int32),
           "image": rng.normal(size=(n, 6, 6, channels)).astype(np.float32)}
  sizes = []

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    assert split == "val" and {"embed_image": "trained", "pixels": None}[name] == params
    out = images if name == "embed_image" else batch["image"].reshape(n, -1)
    return out[:limit][:first], {key: batch[key][:limit][:first] for key in keys}

  def predict(name, inputs):
    assert name == "embed_text"
    sizes.append(len(inputs["text"]))
    return np.array([vector(decode(ids)) for ids in inputs["text"]], np.float32)

  return SimpleNamespace(**{**dict(
      collect=collect, predict=predict, detokenize=decode, eval_split="val",
      to_pixels=lambda x: x / 4 + 0.5, figures=tmp_path / "figures", step=7, images=images,
      sizes=sizes), **fields})


# recall

@pytest.mark.parametrize("shape", [(60, 170), (170, 60), (1, 9)])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.3])
def test_recall_against_sorting(shape, density):
  rng = np.random.default_rng(0)
  right = rng.uniform(size=shape) < density
  right[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True  # at least one each
  queries, candidates = random_unit(rng, shape[0], 12), random_unit(rng, shape[1], 12)
  expected = sorted_recall(queries.astype(float) @ candidates.T.astype(float), right, (1, 3, 10))
  results = [retrieval.recall(queries, candidates, np.nonzero(right), (1, 3, 10), block=block)
             for block in (1, 7 * shape[1], 2**24)]
  assert results[0] == results[1] == results[2]  # of any block, to the last bit
  assert results[0] == pytest.approx(expected, abs=1e-12)


def test_ties_count_by_the_share_of_orders_that_hit():
  rng = np.random.default_rng(0)
  for _ in range(20):
    candidates = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 6)]  # many equal ones
    query = np.float32([[0.8, 0.6, 0]])[:, rng.permutation(3)]
    right = rng.permutation([True, True, False, False, False, rng.uniform() < 0.5])[None]
    hits = {k: [] for k in (1, 2, 4)}
    for order in itertools.permutations(range(6)):
      ranked = sorted(order, key=lambda c: -(query @ candidates[c])[0])
      for k, found in hits.items():
        found.append(right[0, ranked[:k]].any())
    expected = {k: np.mean(found) for k, found in hits.items()}
    found = retrieval.recall(query, candidates, np.nonzero(right), (1, 2, 4))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_constant_embeddings_score_chance(block):
  n, m, width = 67, 5, 1024  # wide: the most rounding, which must not decide
  x = random_unit(np.random.default_rng(0), width)
  image, text = np.repeat(np.arange(n), m), np.arange(n * m)
  images, texts = np.tile(x, (n, 1)), np.tile(x, (n * m, 1))
  found = retrieval.recall(texts, images, (text, image), (1, 5, 10), block)
  assert found == pytest.approx({k: k / n for k in (1, 5, 10)})
  found = retrieval.recall(images, texts, (image, text), (1, 5, 10), block)
  assert found == pytest.approx(
      {k: 1 - math.comb(n * m - m, k) / math.comb(n * m, k) for k in (1, 5, 10)})


def test_recall_of_broken_embeddings_is_zero():
  own = np.arange(20), np.arange(20)
  x = random_unit(np.random.default_rng(0), 20, 8)
  broken = np.full_like(x, np.nan)
  for queries, candidates in ((broken, x), (x, broken), (broken, broken)):
    assert retrieval.recall(queries, candidates, own, (1, 10)) == {1: 0.0, 10: 0.0}


def test_recall_runs_in_bounded_memory():
  def compiled(n):
    x, own = jax.ShapeDtypeStruct((n, 32), "float32"), jax.ShapeDtypeStruct((n,), "int32")
    return retrieval.standing.lower(x, x, own, own, block=2**24).compile().memory_analysis()

  assert compiled(100_000).temp_size_in_bytes < 2**28  # all similarities: 40 GB
  n = 20_000
  x = random_unit(np.random.default_rng(0), n, 16)
  sign = np.where(np.arange(n) < 0.3 * n, 1, -1).astype(np.float32)[:, None]
  # The right one of most queries is their opposite, so that all others come before it.
  order = np.random.default_rng(1).permutation(n)
  assert retrieval.recall(x, (sign * x)[order], (order, np.arange(n)), (1, 10)) == pytest.approx(
      {1: 0.3, 10: 0.3})


# the evaluator

CAPTIONS = [[f"thing {i}, from side {j}" for j in range(1 + i % 4)] for i in range(40)]


def by_hand(images, texts, right):
  scores = images.astype(float) @ np.array(texts).T
  metrics = {"chance": right.mean()}
  for name, s, r in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
    metrics |= {f"{name}/r{k}": value for k, value in sorted_recall(s, r, (1, 5)).items()}
  return metrics


@pytest.mark.parametrize("limit", [None, 23])
def test_several_captions_an_image(tmp_path, limit):
  context = fake_context(tmp_path, CAPTIONS, 0.25)
  texts = [text for own in CAPTIONS[:limit] for text in own]
  right = np.array([[text in own for text in texts] for own in CAPTIONS[:limit]])
  expected = by_hand(context.images[:limit], [vector(text) for text in texts], right)
  metrics = retrieval.evaluate(context, ks=(1, 5), limit=limit, examples=0)
  assert metrics == pytest.approx(expected)
  assert expected["chance"] < 0.1 < expected["text_to_image/r1"] < expected["image_to_text/r1"] < 1


STYLES = ("serif", "bold serif", "mono")
GLYPHS = [[f"letter {i % 25}, {STYLES[i % 3]}"] + [f"sign {i % 25}, {s}" for s in STYLES[:i % 3]]
          for i in range(150)]  # every caption belongs to several images


def test_captions_of_other_images_are_wrong_even_if_they_say_the_same(tmp_path):
  context = fake_context(tmp_path, [["one"], ["one"], ["two"], ["two"]], 0)
  metrics = retrieval.evaluate(context, ks=(1, 2), examples=0)
  assert metrics == pytest.approx({"image_to_text/r1": 0.5, "image_to_text/r2": 1,
                                   "text_to_image/r1": 0.5, "text_to_image/r2": 1, "chance": 0.25})


@pytest.mark.parametrize("unique,key", [
    (".*", lambda text: text), ("[^,]*", lambda text: text.split(",")[0])])
def test_captions_that_agree_are_one_text(tmp_path, unique, key):
  context = fake_context(tmp_path, GLYPHS, 0.3)
  distinct = {text for own in GLYPHS for text in own}
  names = sorted({key(text) for text in distinct})
  texts = [np.mean([vector(text) for text in distinct if key(text) == name], 0) for name in names]
  texts = [text / np.linalg.norm(text) for text in texts]
  right = np.array([[name in map(key, own) for name in names] for own in GLYPHS])
  metrics = retrieval.evaluate(context, ks=(1, 5), unique=unique, examples=0)
  assert metrics == pytest.approx(by_hand(context.images, texts, right))
  assert metrics["chance"] < 0.05 and 0.1 < metrics["image_to_text/r1"] < 1
  assert len(names) == {".*": 125, "[^,]*": 50}[unique] and sum(context.sizes) == 125


def test_text_is_embedded_in_batches_of_one_size():
  ids, sizes = np.arange(46).reshape(23, 2), []

  def predict(name, batch):
    sizes.append(len(batch["text"]))
    return batch["text"] * 2.0

  np.testing.assert_array_equal(retrieval.embed_text(predict, ids, batch_size=10), ids * 2.0)
  assert sizes == [10, 10, 10]
  np.testing.assert_array_equal(retrieval.embed_text(predict, ids[:3]), ids[:3] * 2.0)
  assert sizes[3:] == [3]


# figures

@pytest.mark.parametrize("channels,count", [(1, 40), (3, 3)])
def test_figures_show_what_is_found(tmp_path, monkeypatch, channels, count):
  captions = [["shared", rf"it costs {i} $\no$"] for i in range(count)]  # not a formula
  context = fake_context(tmp_path, captions, 0.0, channels=channels)
  drawn = {}
  for name, draw in (("grid", retrieval.grid), ("matrix", retrieval.matrix)):
    monkeypatch.setattr(retrieval, name, lambda *a, name=name, draw=draw:
                        drawn.setdefault(name, (draw(*a), a))[0])
  retrieval.evaluate(context, unique=".*", examples=2, gallery=20)

  figure, (scores, right, images, strings, rows, columns, _) = drawn["grid"]
  count = min(count, 20)
  assert scores.shape == right.shape == (count, count + 1) and len(images) == count
  np.testing.assert_allclose(scores, context.images[:count] @ np.array(
      [vector(text) for text in strings]).T, atol=1e-6)
  np.testing.assert_array_equal(right, [[text in own for text in strings]
                                        for own in captions[:count]])
  np.testing.assert_allclose(
      images, context.collect("pixels", "val", "image", params=None)[1]["image"][:count] / 4 + 0.5,
      atol=1e-6)
  assert right[rows, columns].all() and len(set(columns)) == 2
  axes = np.reshape(figure.axes, (2, -1))
  for line, t in zip(axes, columns):
    shown = [axis for axis in line[1:6] if axis.images]
    order = np.argsort(-scores[:, t])[:len(shown)]
    assert len(shown) == min(5, count)
    for axis, j in zip(shown, order):
      assert axis.get_title() == f"{scores[j, t]:.2f}"
      assert (axis.spines["left"].get_linewidth() > 1) == right[j, t]
      np.testing.assert_allclose(np.asarray(axis.images[0].get_array()).reshape(images[j].shape),
                                 np.clip(images[j], 0, 1), atol=1e-6)
    assert line[0].texts[0].get_text().replace("\n", " ") == strings[t]

  figure, _ = drawn["matrix"]
  values = np.asarray(figure.axes[-1].images[0].get_array())
  np.testing.assert_allclose(values, scores[np.ix_(rows, columns)].T)
  for name in ("retrieval", "similarity"):
    picture = imread(tmp_path / "figures" / f"{name}_step00000007.png")
    assert picture[..., :3].std() > 0.1


# what a user may get wrong

@pytest.mark.parametrize("settings,message", [
    ({"ks": ()}, r"evals.retrieval.ks=\(\) must be"),
    ({"ks": 5}, "evals.retrieval.ks=5 must be"),
    ({"ks": (0, 1)}, r"evals.retrieval.ks=\(0, 1\) must be"),
    ({"limit": 0}, "evals.retrieval.limit = 0 must be at least 1"),
    ({"examples": -1}, "evals.retrieval.examples = -1 must be at least 0"),
    ({"gallery": 0}, "evals.retrieval.gallery = 0 must be at least 1"),
    ({"unique": "["}, r"evals.retrieval.unique='\[' is no regular expression"),
    ({"unique": "dog"}, "evals.retrieval.unique='dog' does not match the caption 'thing"),
])
def test_bad_settings(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    retrieval.evaluate(fake_context(tmp_path, CAPTIONS, 0.1), **settings)


def test_without_captions(tmp_path):
  with pytest.raises(ValueError, match="evals.retrieval needs texts: set data.tokenizer"):
    retrieval.evaluate(fake_context(tmp_path, CAPTIONS, 0.1, detokenize=None))
