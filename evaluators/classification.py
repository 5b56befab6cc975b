"""Accuracy and cross-entropy of a method's own classifier."""

import numpy as np
import optax


def num_classes(context, evaluator):
  """Number of classes of the data; a ValueError naming `evaluator` where it has no labels."""
  if not context.info.num_classes:
    raise ValueError(f"evals.{evaluator} needs labels; this data source has none")
  return context.info.num_classes


def topk(scores, labels):
  """Top-1 accuracy, and top-5 where there are more than five classes.

  Equal scores rank in class order, as under argmax. A label scored -inf or NaN is never a hit, so
  neither a class without a vote nor a diverged network counts as right.

  Args:
    scores: [B, classes] array, higher is more likely.
    labels: int [B] array.

  Returns:
    {"top1": float, "top5": float}, in [0, 1].
  """
  own = np.take_along_axis(scores, labels[:, None], axis=1)  # b 1
  earlier = np.arange(scores.shape[1]) < labels[:, None]  # b classes
  rank = np.sum((scores > own) | (scores == own) & earlier, axis=1)  # b
  scored = own[:, 0] > -np.inf  # b
  ks = (1, 5) if scores.shape[1] > 5 else (1,)
  return {f"top{k}": float(np.mean((rank < k) & scored)) for k in ks}


def evaluate(context):
  """Top-1, top-5 and mean cross-entropy (nats) of `logits`, each evaluation example once."""
  num_classes(context, "classification")
  logits, batch = context.collect("logits", context.eval_split, "label", params="trained")
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  return topk(logits, batch["label"]) | {"loss": float(loss.mean())}
