"""What a generator makes: grids of samples, and whether a judge recognises what was asked for."""

import textwrap

import jax
import numpy as np
from matplotlib.figure import Figure

from evaluators import classification, knn


def evaluate(context, predictions=("sample",), guidance=(0.0, 1.0, 2.0, 4.0), per_class: int = 4,
             count: int = 1000, count_guidance: float = 2.0, judge: str = "", k: int = 5):
  """Share of samples that a judge trained on real images recognises as the class asked for.

  Args:
    predictions: names of the method's samplers.
    guidance: scales that the figure shows, a block of columns each.
    per_class: samples of each class and scale in the figure; 0 = no figure.
    count: samples that the judge sees, the classes in turn; 0 = none.
    count_guidance: their guidance scale.
    judge: run directory of a classifier of images of this size; "" = k-NN on the pixels of four
      fifths of the training split.
    k: its neighbours.

  Writes:
    `context.figures / {prediction}_step{step:08d}.png`, a row for each class.

  Returns:
    {prediction}/recognised for each prediction; judge/held_out, its accuracy on the real images of
    the evaluation split, or of the last fifth of the training split for k-NN.

  Raises:
    ValueError: data without labels; numbers out of range.
  """
  classes = classification.num_classes(context, "samples")
  if per_class < 0 or count < 0 or k < 1:
    raise ValueError(f"evals.samples: per_class = {per_class}, count = {count} and k = {k} must be "
                     "at least 0, 0 and 1")
  mean, std = np.asarray(context.mean), np.asarray(context.std)

  def draw(prediction, labels, scale, seed):
    """Samples in [0, 1], in batches of one size."""
    size, parts = min(250, len(labels)), []
    for start in range(0, len(labels), size):
      part = np.resize(labels[start:start + size], size)
      batch = {"label": part.astype(np.int32), "guidance": np.full(size, scale, np.float32)}
      key = jax.random.fold_in(jax.random.key(context.seed + seed), start)
      parts.append(context.predict(prediction, batch, key))
    return np.clip(np.concatenate(parts)[:len(labels)] * std + mean, 0, 1)   # b h w c

  metrics = {}
  if count:
    judged, metrics["judge/held_out"] = make_judge(context, judge, k, classes)
    labels = np.arange(count) % classes
  for prediction in predictions:
    if count:
      images = draw(prediction, labels, count_guidance, seed=1)
      metrics[f"{prediction}/recognised"] = judged(images, labels)
    if per_class:
      rows = [draw(prediction, np.repeat(np.arange(classes), per_class), scale, seed=0)
              for scale in guidance]
      figure = sheet(np.stack(rows), classes, guidance, context.info.class_names)
      figure.supxlabel(textwrap.fill(
        f"Step {context.step}, {prediction!r}: a row for each class, the same noise at every "
        "guidance scale (0: the class is not told).", 90), fontsize=8)
      context.figures.mkdir(parents=True, exist_ok=True)
      figure.savefig(context.figures / f"{prediction}_step{context.step:08d}.png", dpi=150)
  return metrics


def make_judge(context, judge: str, k: int, classes: int):
  """((images in [0, 1] [b, h, w, c], labels [b]) -> accuracy, its accuracy on held-out images)."""
  split = context.eval_split if judge else context.train_split
  pixels, batch = context.collect("pixels", split, "image", "label", params=None)
  real = np.clip(pixels.reshape(batch["image"].shape) * context.std + context.mean, 0, 1)
  labels = batch["label"]
  if judge:
    run = context.load_run(judge)

    def classify(images):
      stored = np.round(images * 255).astype(np.uint8)
      return run.predict("logits", {"image": run.preprocess(stored)}).argmax(1)
    return lambda x, y: float((classify(x) == y).mean()), float((classify(real) == labels).mean())
  held = np.arange(len(real)) % 5 == 4
  bank = real[~held].reshape((~held).sum(), -1)

  def judged(images, labels_asked):
    votes = knn.votes(bank, labels[~held], images.reshape(len(images), -1), 0.07, k=k,
                      classes=classes)
    return float((np.asarray(votes).argmax(1) == labels_asked).mean())
  return judged, judged(real[held], labels[held])


def sheet(images, classes, guidance, names):
  """images [scales, classes * n, h, w, c] in [0, 1] -> one figure, blocks of n columns a scale."""
  scales, per_class = len(guidance), images.shape[1] // classes
  h, w, c = images.shape[2:]
  blocks = images.reshape(scales, classes, per_class, h, w, c).transpose(1, 3, 0, 2, 4, 5)
  gap = np.ones((classes, h, scales, per_class, 1, c))                       # a line between images
  blocks = np.concatenate([blocks, gap], axis=4)
  gap = np.ones((classes, 1, *blocks.shape[2:]))
  blocks = np.concatenate([blocks, gap], axis=1)                             # class h+1 s n w+1 c
  canvas = blocks.reshape(classes * (h + 1), -1, c)
  width = per_class * (w + 1)
  figure = Figure((min(12, 0.45 * scales * per_class + 1), min(14, 0.45 * classes + 1)),
                  layout="constrained")
  axis = figure.subplots()
  axis.imshow(canvas[..., 0] if c == 1 else canvas, cmap="gray", vmin=0, vmax=1,
              interpolation="nearest")
  axis.set_xticks([(i + 0.5) * width for i in range(scales)],
                  [f"guidance {scale:g}" for scale in guidance], fontsize=8)
  axis.set_yticks([(i + 0.5) * (h + 1) for i in range(classes)],
                  names or [str(i) for i in range(classes)], fontsize=8)
  for i in range(1, scales):
    axis.axvline(i * width - 1, color="tab:orange", linewidth=1.5)
  axis.tick_params(length=0)
  return figure
