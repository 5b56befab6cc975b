"""The evaluator of generated images: copies, honest draws and noise; a real sampler; bad input."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from evaluators import distances, generation
from trainer import evaluation, recipe

METRICS = ("frechet", "kernel", "kernel_se", "precision", "recall", "nearest")


class Context(NamedTuple):
  """The trainer's context on two splits of random images, with generators that are known."""
  figures: Path
  images: dict  # split -> uint8 [b, h, w, c]
  predictions: dict  # name -> function of a batch
  runs: dict = {}  # directory -> Run
  classes: int = 3
  asked: list = []  # labels that were asked for
  train_split: str = "train"
  eval_split: str = "test"
  step: int = 7
  seed: int = 0

  @property
  def info(self):
    return SimpleNamespace(num_classes=self.classes, image_shape=self.images["train"].shape[1:])

  def labels(self, split):
    """0, 1, 2, 2, 0, 1, ..."""
    return np.minimum(np.arange(len(self.images[split])) % 4, 2).astype(np.int32)

  def to_pixels(self, image):
    return image / 4 + 0.5

  def collect(self, name, split, *keys, params="trained", limit=None, first=None):
    assert params is None
    image = ((self.images[split] / 255 - 0.5) * 4).astype(np.float32)
    batch = {"image": image} | ({"label": self.labels(split)} if self.classes else {})
    pixels = image.reshape(len(image), -1)
    return pixels[:limit][:first], {key: batch[key][:limit][:first] for key in keys}

  def predict(self, name, batch, rng):
    assert ("label" in batch) == bool(self.classes) and rng is not None
    assert batch["noise"].shape[1:] == self.images["train"].shape[1:]
    if self.classes:
      assert (batch["guidance"] == 1.5).all()
      self.asked.append(batch["label"])
    return np.asarray(self.predictions[name](np.asarray(batch["noise"])), np.float32)

  def load_run(self, workdir):
    if workdir not in self.runs:
      raise FileNotFoundError(f"{workdir} holds no run")
    return self.runs[workdir]


def make_context(tmp_path, **fields):
  """Images of 4 x 4 grey pixels around 0.5, Gaussian and clipped nowhere, to be drawn again."""
  rng = np.random.default_rng(0)
  grey = fields.pop("channels", 1)
  draw = lambda z: np.round(127 + 25 * z)  # noqa: E731
  images = {split: draw(rng.standard_normal((n, 4, 4, grey))).astype(np.uint8)
            for split, n in (("train", 400), ("test", 200))}
  normalised = lambda x: (x / 255 - 0.5) * 4  # noqa: E731
  return Context(tmp_path / "figures", images, {
    "copies": lambda z: normalised(images["train"][:len(z)]),
    "fresh": lambda z: normalised(draw(z)),
    "flat": lambda z: normalised(draw(0.1 * z)),
    "broken": lambda z: z * np.nan}, asked=[], **fields)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
  context = make_context(tmp_path_factory.mktemp("generation"))
  return context, generation.evaluate(context, ("copies", "fresh", "flat", "broken"), guidance=1.5,
                                      examples=4, neighbours=2)


def test_numbers_tell_copies_honest_draws_and_collapse_apart(evaluated):
  context, metrics = evaluated
  assert set(metrics) == {f"{name}/{metric}" for metric in METRICS
                          for name in ("real", "copies", "fresh", "flat", "broken")}
  assert all(np.isfinite(value) for value in metrics.values())
  train, test = (context.images[split].reshape(-1, 16) / 255 for split in ("train", "test"))
  # The floor, by NumPy on what is stored.
  np.testing.assert_allclose(metrics["real/frechet"], distances.frechet(train, test), rtol=1e-4)
  apart = np.linalg.norm(test[:, None] - train[None], axis=-1)
  np.testing.assert_allclose(metrics["real/nearest"], np.median(apart.min(1)), rtol=1e-4)
  for metric in ("frechet", "precision", "recall", "nearest"):  # drawn as the held-out images are
    np.testing.assert_allclose(metrics[f"fresh/{metric}"], metrics[f"real/{metric}"], rtol=0.25)
  for name in ("real", "fresh"):
    assert abs(metrics[f"{name}/kernel"]) < 3 * metrics[f"{name}/kernel_se"]
  assert metrics["copies/nearest"] == 0 and metrics["copies/precision"] == 1
  assert metrics["flat/frechet"] > 5 * metrics["real/frechet"]
  assert metrics["broken/kernel"] > 5 * metrics["broken/kernel_se"] > 0  # black
  assert metrics["flat/precision"] == 1 and metrics["flat/recall"] < 0.1
  assert metrics["broken/frechet"] > 3 and metrics["broken/precision"] == 0


def test_labels_are_asked_for_as_the_data_has_them(evaluated):
  context, _ = evaluated
  asked = np.concatenate(context.asked[:1])
  assert len(asked) == 200  # as many as are held out
  np.testing.assert_allclose(np.bincount(asked) / 200, (0.25, 0.25, 0.5), atol=0.1)


def test_figure_shows_samples_beside_their_neighbours(evaluated):
  context, _ = evaluated
  assert sorted(path.name for path in context.figures.iterdir()) == [
    f"{name}_nearest_pixels_step00000007.png" for name in ("broken", "copies", "flat", "fresh")]
  picture = imread(context.figures / "fresh_nearest_pixels_step00000007.png")[..., :3]
  assert min(picture.shape[:2]) > 400 and picture.std() > 0.1
  train = context.images["train"]
  samples = train[:6] + np.arange(0, 12, 2, dtype=np.uint8)[:, None, None, None]
  far, place = map(np.asarray, distances.nearest(samples.reshape(6, -1) / 255,
                                                 train.reshape(400, -1) / 255, 2))
  axes = generation.sheet(samples[::-1], train, far[::-1], place[::-1], 3).axes
  assert [axis.get_title() for axis in axes[::3]] == [f"sample {n} of 6" for n in (1, 2, 6)]
  shown = [axis.get_images()[0].get_array() * 255 for axis in axes]
  for i, row in enumerate((0, 1, 5)):  # least altered first
    np.testing.assert_allclose(shown[3 * i], samples[row, ..., 0])
    np.testing.assert_allclose(shown[3 * i + 1], train[row, ..., 0])
    assert float(axes[3 * i + 1].get_title()) == pytest.approx(2 * row * 4 / 255, rel=1e-2)


def test_features_of_a_run_without_labels(tmp_path, caplog):
  """In batches of one size; few images for their dimensions are warned of."""
  sizes = []

  def features(name, batch):
    assert name == "features"
    sizes.append(len(batch["image"]))
    return batch["image"].reshape(len(batch["image"]), -1)

  run = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(channels=1)),
                        method=SimpleNamespace(predict={"features": None}), predict=features,
                        preprocess=lambda images: np.pad(images / np.float32(255), (
                          (0, 0), (0, 10), (0, 10), (0, 0))))
  context = make_context(tmp_path, runs={"RUN": run}, classes=0)
  with caplog.at_level(logging.WARNING, "vitrine"):
    metrics = generation.evaluate(context, ("fresh",), features="RUN", count=130, examples=0)
  assert set(sizes) == {100} and not context.figures.exists()
  assert "400 training images, 200 held out, 130 samples are too few for 196-dim" in caplog.text
  pixels = generation.evaluate(context, ("fresh",), count=130, examples=0)
  for name in pixels:  # padding moves nothing, but shrinks the kernel's argument
    if "kernel" not in name:
      np.testing.assert_allclose(metrics[name], pixels[name], rtol=1e-3, err_msg=name)


def test_a_diffusion_run(tmp_path):
  config = recipe.load_config("configs/diffusion.py:smoke")
  config.evals = dict(near=dict(name="generation", count=20, limit=60, examples=3))
  built = recipe.build(config, str(tmp_path / "data"))
  batch = {"image": np.zeros((2, 16, 16, 1), np.float32), "label": np.zeros(2, np.int32)}
  weights = jax.jit(built.method.init)(jax.random.key(0), batch)
  evaluate = evaluation.make_evaluate(built, tmp_path, {"trained": lambda: weights})
  metrics = evaluate(3, False)
  assert set(metrics) == {f"near/{name}/{metric}" for name in ("real", "sample")
                          for metric in METRICS}
  assert metrics["near/sample/frechet"] > 3 * metrics["near/real/frechet"] > 0  # noise, untrained
  assert (tmp_path / "figures" / "sample_nearest_pixels_step00000003.png").exists()
  with pytest.raises(ValueError, match="no prediction 'sampel': did you mean 'sample'"):
    built.config.evals.near.predictions = ("sampel",)
    evaluate(3, False)


@pytest.mark.parametrize("fields, error, message", [
  (dict(predictions="fresh"), ValueError, "predictions = 'fresh' must be a tuple of names"),
  (dict(count=1), ValueError, "count = 1 must be at least 2"),
  (dict(k=40, count=40), ValueError, "k = 40: at most 39 of 400 training .* 40 samples"),
  (dict(neighbours=7, limit=6), ValueError, "neighbours = 7: at most 6 of 6 training images"),
  (dict(features="pixel"), FileNotFoundError, "= 'pixel': .* Did you mean 'pixels'?"),
  (dict(features="inceptoin:a.safetensors"), FileNotFoundError, "Did you mean 'inception'?"),
  (dict(features="nowhere/run"), FileNotFoundError, "'inception:FILE', or a run directory"),
  (dict(features="inception:a.pth"), FileNotFoundError, "a.pth: no such file"),
  (dict(features=f"inception:{__file__}"), ValueError, "features = .* is no .safetensors file"),
  (dict(features="GENERATOR"), ValueError, "no prediction 'features', only denoise, sample"),
  (dict(features="COLOUR"), ValueError, "takes images of 3 channels, not of the data's 1")],
  ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_input(fields, error, message, tmp_path):
  def run(channels, *names):
    return SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(channels=channels)),
                           method=SimpleNamespace(predict=dict.fromkeys(names)))
  context = make_context(tmp_path, runs={"GENERATOR": run(1, "sample", "denoise"),
                                         "COLOUR": run(3, "features")})
  with pytest.raises(error, match=f"evals.generation.*{message}"):
    generation.evaluate(context, **{"predictions": ("fresh",), **fields})
  assert not context.asked  # before anything is sampled
