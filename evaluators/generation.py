"""How near generated images are to real ones, and whether they are copies of training images."""

import difflib
import logging
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluators import checks, distances, retrieval, samples
from models import inception

log = logging.getLogger("vitrine")


def check(facts, predictions, count, features, k, limit, examples, neighbours, **_):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, predictions, count, k, limit, examples, neighbours)
  checks.has_prediction(facts, *predictions, field="predictions")
  train, held_out = (min(n, limit or n) for n in (
    facts.info.num_examples[facts.train_split], checks.has_split(facts)))
  check_numbers(train, held_out, count or held_out, k=k, neighbours=neighbours)
  kind, _, file = features.partition(":")
  if kind == "inception" and not Path(file).expanduser().is_file():
    raise ValueError(f"evals.{facts.name}.features = {features!r}: no such file")
  if kind not in ("inception", "pixels"):
    samples.is_run(facts, "features", features, "; allowed: pixels, inception:FILE, DIR of a run")


def ranges(evaluator: str, predictions, count, k: int, limit, examples: int, neighbours: int):
  if isinstance(predictions, str) or not predictions:
    raise ValueError(f"evals.{evaluator}.predictions = {predictions!r} must be a tuple of names")
  checks.at_least(evaluator, count=(count, 2), limit=(limit, 2), k=(k, 1),
                  examples=(examples, 0), neighbours=(neighbours, 1))


def evaluate(context, predictions: tuple[str, ...] = ("sample",), count: int | None = None,
             guidance: float = 1.0, features: str = "pixels", k: int = 3, limit: int | None = None,
             examples: int = 8, neighbours: int = 5):
  """Distances of generated images to the training images, beside those of held-out images.

  Labels are asked for as often as the training images have them. All images are first rounded to
  the 256 levels of stored ones. No distance says anything alone: `real/...`, of held-out images, is
  what a perfect generator would reach, where they are drawn as the training images are, and `count`
  is their number, on which all of these metrics but `kernel` depend.

  Args:
    predictions: names of the method's samplers.
    count: samples of each; None = as many as there are held-out images. Where there are no more
      images of a kind than features have dimensions, the Frechet distance comes out far too large:
      a warning is logged.
    guidance: scale that they are made with.
    features: the space of the distances. "pixels": the values in [0, 1], for small images;
      "inception:FILE": `models.inception`, grey images as coloured ones; or a run directory, whose
      prediction "features" is used, after its own resizing and normalisation.
    k: neighbours that the radii of precision and recall reach to.
    limit: how many images of either split, spread over it; None = all. They are held in memory.
    examples: samples in the figure; 0 = no figure. The first is the one nearest to a training
      image, the last the furthest, and small ranks are the denser.
    neighbours: training images beside each.

  Writes:
    `context.figures / {prediction}_nearest_{space}_step{step:08d}.png`.

  Returns:
    For each prediction, and for the held-out images as "real": /frechet, /kernel and its standard
    error /kernel_se, /precision, /recall (see `distances`), and /nearest, the median distance to
    the nearest training image: far below that of held-out images, the samples are copies.

  Raises:
    ValueError: numbers out of range, a run without "features", images of other channels.
    FileNotFoundError: `features` does not exist.
  """
  ranges("generation", predictions, count, k, limit, examples, neighbours)
  embed = make_embed(context, features)
  train, labels = real_images(context, context.train_split, limit)
  held_out, _ = real_images(context, context.eval_split, limit)
  count = count or len(held_out)
  check_numbers(len(train), len(held_out), count, k=k, neighbours=neighbours)
  labels = np.resize(np.random.default_rng(context.seed).permutation(labels), count)
  bank = embed(train)
  warn_of_few(len(train), len(held_out), count, bank.shape[1], features)
  how = dict(k=k, neighbours=neighbours, seed=context.seed)
  metrics, real_far, _ = compare("real", embed(held_out), bank, **how)
  for prediction in predictions:
    images = stored(samples.draw(context, prediction, labels, guidance, seed=2))
    values, far, place = compare(prediction, embed(images), bank, **how)
    metrics |= values
    if examples:
      figure = sheet(images, train, far, place, examples)
      write(context, prediction, figure, features, len(train), far[:, 0], real_far[:, 0])
  return metrics


def check_numbers(train: int, held_out: int, count: int, **fields: int):
  """Raises ValueError where there are fewer images of a kind than neighbours are asked for."""
  most = {"k": min(train, held_out, count) - 1, "neighbours": train}
  for field, value in fields.items():
    if value > most[field]:
      raise ValueError(f"evals.generation.{field} = {value}: at most {most[field]} of {train} "
                       f"training images, {held_out} held out, {count} samples")


def warn_of_few(train: int, held_out: int, count: int, dimensions: int, features: str):
  if dimensions >= min(train, held_out, count):
    log.warning("evals.generation: %d training images, %d held out, %d samples are too few for "
                "%d-dimensional features %r: the Frechet distance comes out far too large",
                train, held_out, count, dimensions, features)


def compare(name: str, x, bank, k: int, neighbours: int, seed: int):
  """Features x [b, D] of images of one kind against the training images', `bank` [M, D].

  Returns:
    ({name/metric: float}, distances to the nearest of the bank [b, neighbours], their places).
  """
  far, place = map(np.asarray, distances.nearest(x, bank, neighbours))
  kernel, error = distances.kernel(bank, x, seed=seed)
  precision, recall = distances.precision_recall(bank, x, k)
  values = {"frechet": distances.frechet(bank, x), "kernel": kernel, "kernel_se": error,
            "precision": precision, "recall": recall, "nearest": np.median(far[:, 0])}
  return {f"{name}/{key}": float(value) for key, value in values.items()}, far, place


def write(context, prediction: str, figure, features: str, train: int, far, real_far):
  """Writes a `sheet`, with what distances `far` and `real_far` [b] to the nearest image say."""
  figure.supxlabel(textwrap.fill(
    f"Step {context.step}, {prediction!r}: samples by their distance in {features!r} to the "
    f"nearest of {train} training images, on the right. Median of {len(far)} samples: "
    f"{np.median(far):.3g}; of held-out images: {np.median(real_far):.3g}, the least "
    f"{np.min(real_far):.3g}.", 80), fontsize=8)
  context.figures.mkdir(parents=True, exist_ok=True)
  space = Path(features.partition(":")[0]).name
  figure.savefig(context.figures / f"{prediction}_nearest_{space}_step{context.step:08d}.png",
                 dpi=150)


def stored(images):
  """Images in [0, 1] as uint8; what is not finite is black."""
  return np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


def real_images(context, split: str, limit: int | None):
  """(uint8 images [b, h, w, c], their labels; zeros if the data has none) of a split."""
  keys = ("image", "label") if context.info.num_classes else ("image",)
  _, batch = context.collect("pixels", split, *keys, params=None, limit=limit)
  images = stored(context.to_pixels(batch["image"]))
  return images, batch.get("label", np.zeros(len(images), np.int32))


def make_embed(context, features: str, batch_size: int = 100):
  """uint8 images [b, h, w, c] -> features [b, D]; `evaluate` describes them and the errors."""
  if features == "pixels":
    return lambda images: images.reshape(len(images), -1) / np.float32(255)
  where, (kind, _, path) = f"evals.generation.features = {features!r}", features.partition(":")
  try:
    if kind == "inception":
      variables, channels = inception.load(path), (1, 3)
    else:
      run = context.load_run(features)
      channels = (run.config.model.channels,)
  except FileNotFoundError as error:
    near = difflib.get_close_matches(kind, ("pixels", "inception"), 1)
    raise FileNotFoundError(f"{where}: {error}. " + (
      f"Did you mean {near[0]!r}?" if near and near[0] != kind else
      "Allowed: 'pixels', 'inception:FILE', or a run directory")) from error
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  if kind != "inception" and "features" not in run.method.predict:
    raise ValueError(f"{where}: that run has no prediction 'features', only "
                     f"{', '.join(sorted(run.method.predict))}")
  if context.info.image_shape[-1] not in channels:
    raise ValueError(f"{where}: takes images of {' or '.join(map(str, channels))} channels, not of "
                     f"the data's {context.info.image_shape[-1]}")

  def embed_batch(images):
    if kind == "inception":
      return inception.features(variables, np.broadcast_to(images, (*images.shape[:3], 3)))
    return run.predict("features", {"image": run.preprocess(images)})

  def embed(images):
    """In batches of one size, so that one program does for all."""
    size = min(batch_size, len(images))
    return np.concatenate([
      embed_batch(np.resize(images[start:start + size], (size, *images.shape[1:])))
      for start in range(0, len(images), size)])[:len(images)]

  return embed


def sheet(images, train, far, place, examples: int):
  """A row for each of some samples: it and its nearest training images, distances above."""
  ranks = np.unique(np.geomspace(1, len(images), examples).round().astype(int))
  rows = np.argsort(far[:, 0], kind="stable")[ranks - 1]
  columns = far.shape[1] + 1
  figure = Figure((1.1 * columns + 0.6, 1.2 * len(rows) + 0.9), layout="constrained")
  for line, rank, row in zip(figure.subplots(len(rows), columns, squeeze=False), ranks, rows):
    retrieval.show(line[0], images[row, ..., :3] / 255, f"sample {rank} of {len(images)}",
                   "tab:blue")
    for axis, distance, i in zip(line[1:], far[row], place[row]):
      retrieval.show(axis, train[i, ..., :3] / 255, f"{distance:.3g}")
  return figure
