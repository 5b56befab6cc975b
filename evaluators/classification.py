"""Accuracy and cross-entropy of a method's own classifier, and which classes it confuses."""

import textwrap

import numpy as np
import optax
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from evaluators import checks


def confusion(labels, predicted, classes: int):
  """How many examples of each class (rows) were taken for each class (columns): int [C, C]."""
  return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def sheet(counts, names, pairs: int, caption: str, most: int = 100):
  """The most confused pairs of `confusion`, and the matrix itself of at most `most` classes."""
  share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  wrong = counts * (1 - np.eye(len(counts), dtype=int))
  order = np.lexsort((-share.ravel(), -wrong.ravel()))[:pairs]               # most, then of fewest
  order = order[wrong.ravel()[order] > 0]
  shows_matrix = len(counts) <= most
  side = max(4, min(9, 0.13 * len(counts) + 2))
  size = (side * shows_matrix + 4.5, side + 0.5 if shows_matrix else 0.25 * pairs + 1)
  figure = Figure(size, layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=[side if shows_matrix else 1e-3, 4.5])
  if shows_matrix:
    image = left.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ticks, size = range(len(names)), min(8, 420 / len(names))
    left.set_xticks(ticks, names, fontsize=size, rotation=90, parse_math=False)
    left.set_yticks(ticks, names, fontsize=size, parse_math=False)
    left.tick_params(length=0, pad=1)
    left.set(xlabel="taken for", ylabel="class")
    figure.colorbar(image, ax=left, shrink=0.6, label="share of the class's examples")
  else:
    left.axis("off")
  rows, columns = np.unravel_index(order, counts.shape)
  right.barh(np.arange(len(order)), counts[rows, columns], color="tab:blue", alpha=0.4)
  for place, (row, column) in enumerate(zip(rows, columns)):
    right.text(0, place, f" {names[row]} taken for {names[column]}: {counts[row, column]} of "
               f"{counts[row].sum()}", va="center", fontsize=8, parse_math=False)
  right.set(xticks=[], yticks=[], ylim=(pairs - 0.5, -0.5), title=(
    "most confused" if len(order) else "nothing confused"))
  right.spines[:].set_visible(False)
  figure.supxlabel(textwrap.fill(caption, 100), fontsize=8)
  return figure


def check(facts, pairs):
  """Raises ValueError on what `evaluate` would stumble over."""
  checks.at_least(facts.name, pairs=(pairs, 0))
  checks.num_classes(facts, facts.name)
  checks.has_split(facts)
  checks.has_prediction(facts, "logits")


def evaluate(context, pairs: int = 25):
  """Top-1, top-5 and mean cross-entropy (nats) of `logits`, each evaluation example once.

  Args:
    pairs: the most confused ones that the figure names, at the end of training; 0 = no figure.

  Writes:
    `context.figures / confusion_step{step:08d}.png`; of more than 100 classes only the pairs.

  Raises:
    ValueError: `pairs` below 0, data without labels.
  """
  checks.at_least("classification", pairs=(pairs, 0))
  classes = checks.num_classes(context, "classification")
  logits, batch = context.collect("logits", context.eval_split, "label", params="trained")
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  metrics = checks.topk(logits, batch["label"]) | {"loss": float(loss.mean())}
  if context.final and pairs:
    counts = confusion(batch["label"], logits.argmax(1), logits.shape[1])
    names = [textwrap.shorten(str(name), 24) for name in context.info.class_names or range(classes)]
    names += [str(i) for i in range(classes, logits.shape[1])]
    figure = sheet(counts, names, pairs, (
      f"Step {context.step}, {context.eval_split}: top-1 {metrics['top1']:.1%} of "
      f"{len(logits)} examples."))
    context.figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(context.figures / f"confusion_step{context.step:08d}.png", dpi=150)
  return metrics
