"""What evaluators share: what they ask of settings and data, in the config's words; accuracy."""

import difflib
from collections.abc import Collection, Iterable

import numpy as np


def at_least(evaluator: str, **fields: tuple):
  """Raises ValueError where a field, (value, least), is below its least; None passes."""
  for name, (value, least) in fields.items():
    if value is not None and value < least:
      raise ValueError(f"evals.{evaluator}.{name} = {value} must be at least {least}")


def all_known(evaluator: str, field: str, names: Iterable[str], known: Collection[str]):
  """Raises ValueError on the first of `names` that is not `known`, with the nearest that is."""
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(str(name), known, 1, 0)
      raise ValueError(f"evals.{evaluator}.{field}: {name!r} is not one of {', '.join(known)}; did "
                       f"you mean {near[0]!r}?")


def has_texts(evaluator: str, context):
  """Raises ValueError where the run has no tokenizer, so no texts."""
  if context.detokenize is None:
    raise ValueError(f"evals.{evaluator} needs texts: set data.tokenizer, for data that has them")


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
