"""Zero-shot classification against float64 NumPy written another way, and its figure."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from test_retrieval import decode, encode, random_unit, vector

from evaluators import zero_shot

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", r"$\gnu$")  # not a formula
TEMPLATES = ("a photo of a {}.", "{}, drawn", "{} {{}} and another {}")


def ensemble(names, templates):
  """[C, D] in float64, one prompt at a time."""
  rows = []
  for name in names:
    total = np.zeros_like(vector(name))
    for template in templates:
      total += vector(name.join(template.split("{}"))) / len(templates)
    rows.append(total / np.sqrt((total * total).sum()))
  return np.array(rows)


def fake_context(tmp_path, n=60, noise=0.4, channels=1, embeddings=None, **fields):
  """A context whose images lie around their class's ensemble."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, len(NAMES), n).astype(np.int32)
  images = ensemble(NAMES, TEMPLATES)[labels] + noise * rng.normal(size=(n, len(vector(""))))
  images = images / np.linalg.norm(images, axis=1, keepdims=True)
  images = images.astype(np.float32) if embeddings is None else embeddings(n)
  batch = {"label": labels, "image": rng.normal(size=(n, 6, 6, channels)).astype(np.float32)}

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    assert split == "val" and {"embed_image": "trained", "pixels": None}[name] == params
    out = images if name == "embed_image" else batch["image"].reshape(n, -1)
    return out[:limit][:first], {key: batch[key][:limit][:first] for key in keys}

  def predict(name, inputs):
    if name == "logit_scale":
      return np.float32(9)
    assert name == "embed_text"
    return np.array([vector(decode(ids)) for ids in inputs["text"]], np.float32)

  return SimpleNamespace(**{**dict(
      collect=collect, predict=predict, tokenize=encode, detokenize=str, eval_split="val",
      to_pixels=lambda x: x / 4 + 0.5,
      info=SimpleNamespace(num_classes=len(NAMES), class_names=NAMES), figures=tmp_path / "figures",
      step=7, images=images, batch=batch), **fields})


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1], TEMPLATES[0]])
def test_class_embeddings_average_the_prompts(templates):
  prompts = []

  def embed(texts):
    prompts.extend(texts)
    return np.array([vector(text) for text in texts], np.float32)

  found = zero_shot.class_embeddings(embed, NAMES, templates)
  templates = (templates,) if isinstance(templates, str) else templates
  np.testing.assert_allclose(found, ensemble(NAMES, templates), atol=1e-6)
  assert len(prompts) == len(NAMES) * len(templates) and "a photo of a bee." in prompts


def test_classify_is_a_softmax():
  rng = np.random.default_rng(0)
  images, classes = random_unit(rng, 9, 16), random_unit(rng, 4, 16)
  found = zero_shot.classify(images, classes, 14.0)
  for row, x in zip(found, images.astype(float)):
    p = np.exp([14 * sum(x * c) for c in classes.astype(float)])
    np.testing.assert_allclose(row, p / p.sum(), rtol=1e-5)


def test_accuracy_against_sorting(tmp_path):
  context = fake_context(tmp_path, n=200, noise=0.5)
  scores = context.images.astype(float) @ ensemble(NAMES, TEMPLATES).T
  order = np.argsort(-scores, axis=1)
  hits = {k: np.mean([label in row[:k] for label, row in zip(context.batch["label"], order)])
          for k in (1, 5)}
  metrics = zero_shot.evaluate(context, templates=TEMPLATES, examples=0)
  assert metrics == pytest.approx({"top1": hits[1], "top5": hits[5], "chance": 1 / 7})
  assert 0.4 < metrics["top1"] < metrics["top5"] < 1
  assert not context.figures.exists()


def test_classes_stand_in_the_order_of_the_labels(tmp_path):
  context = fake_context(tmp_path, noise=0.05)
  context.info.class_names = tuple("0123456")  # as the data has them, unlike prompts
  assert zero_shot.evaluate(context, NAMES, TEMPLATES, examples=0)["top1"] == 1
  assert zero_shot.evaluate(context, ", ".join(NAMES), TEMPLATES, examples=0)["top1"] == 1
  assert zero_shot.evaluate(context, NAMES[::-1], TEMPLATES, examples=0)["top1"] < 0.4
  assert zero_shot.evaluate(context, None, TEMPLATES, examples=0)["top1"] < 0.6


@pytest.mark.parametrize("collapsed", ["images", "texts"])
def test_constant_embeddings_score_chance(tmp_path, collapsed):
  def constant(n):
    return np.tile(vector("").astype(np.float32), (n, 1))

  context = fake_context(tmp_path, embeddings=constant if collapsed == "images" else None)
  if collapsed == "texts":
    context.predict = lambda name, batch: constant(len(batch["text"]))
    assert zero_shot.evaluate(context, examples=0) == pytest.approx(
        {"top1": 1 / 7, "top5": 5 / 7, "chance": 1 / 7})
  else:  # then one class takes all
    first = np.argmax(ensemble(NAMES, ("{}",)) @ vector(""))
    assert zero_shot.evaluate(context, examples=0)["top1"] == pytest.approx(
        np.mean(context.batch["label"] == first))


def test_five_classes_have_no_top5(tmp_path):
  context = fake_context(tmp_path)
  context.info.class_names, context.info.num_classes = NAMES[:5], 5
  context.batch["label"] %= 5
  assert sorted(zero_shot.evaluate(context, examples=0)) == ["chance", "top1"]


@pytest.mark.parametrize("classes,names", [
    ("a, b c,d", ("a", "b c", "d")), (("a", "b"), ("a", "b")), ((1, 2), ("1", "2")),
    (5, ("5",)), (["x y"], ("x y",))])
def test_parse_classes(classes, names):
  assert zero_shot.parse_classes(classes) == names


@pytest.mark.parametrize("channels,examples", [(1, 5), (3, 4), (1, 99)])
def test_figure_shows_the_likeliest_classes(tmp_path, monkeypatch, channels, examples):
  context, drawn = fake_context(tmp_path, n=9, channels=channels), []
  monkeypatch.setattr(zero_shot, "sheet", lambda *a, sheet=zero_shot.sheet:
                      drawn.append(sheet(*a)) or drawn[0])
  zero_shot.evaluate(context, templates=TEMPLATES, examples=examples)
  scores = 9 * context.images.astype(float) @ ensemble(NAMES, TEMPLATES).T
  axes = np.reshape(drawn[0].axes, (-1, 2))
  count = min(examples, 9)
  assert len(axes) == count + count % 2
  for (left, right), image, label, s in zip(axes[:count], context.batch["image"],
                                            context.batch["label"], scores):
    shown = np.asarray(left.images[0].get_array()).reshape(image.shape)
    np.testing.assert_allclose(shown, np.clip(image * 0.25 + 0.5, 0, 1), atol=1e-6)
    assert right.get_title(loc="left") == f"is: {NAMES[label]}"
    p = np.exp(s) / np.exp(s).sum()
    best = sorted(range(7), key=lambda c: -p[c])[:3]
    assert [t.get_text() for t in right.texts] == [f"{p[c]:.2f}  {NAMES[c]}" for c in best]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], p[best], rtol=1e-4)
    assert [t.get_weight() == "bold" for t in right.texts] == [c == label for c in best]
  picture = imread(tmp_path / "figures" / "zero_shot_step00000007.png")
  assert picture[..., :3].std() > 0.1


# what a user may get wrong

@pytest.mark.parametrize("settings,message", [
    ({"classes": "a,b"}, "evals.zero_shot.classes has 2 names, but the data has 7 classes"),
    ({"classes": "a,,b"}, "evals.zero_shot.classes='a,,b' must be names"),
    ({"classes": ()}, r"evals.zero_shot.classes=\(\) must be names"),
    ({"templates": ("a {}", "b")}, r"evals.zero_shot.templates=\['b'\]: each needs a '{}'"),
    ({"templates": "photo"}, r"evals.zero_shot.templates=\['photo'\]: each needs"),
    ({"templates": ()}, r"evals.zero_shot.templates=\(\): each needs"),
    ({"examples": -1}, "evals.zero_shot.examples = -1 must be at least 0"),
])
def test_bad_settings(tmp_path, settings, message):
  context = fake_context(tmp_path)
  context.predict = context.collect = None  # before anything runs
  with pytest.raises(ValueError, match=message):
    zero_shot.evaluate(context, **settings)


def test_without_labels_or_captions(tmp_path):
  with pytest.raises(ValueError, match="evals.zero_shot needs labels"):
    zero_shot.evaluate(fake_context(tmp_path, info=SimpleNamespace(num_classes=0)))
  with pytest.raises(ValueError, match="evals.zero_shot needs texts: set data.tokenizer"):
    zero_shot.evaluate(fake_context(tmp_path, detokenize=None))
