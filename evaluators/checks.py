"""What evaluators share: what they ask of settings and data, in the config's words; measures."""

import difflib
from collections.abc import Callable, Collection, Iterable

import numpy as np


def at_least(evaluator: str, **fields: tuple):
  """Raises ValueError where a field, (value, least), is below its least; None passes."""
  for name, (value, least) in fields.items():
    if value is not None and value < least:
      raise ValueError(f"evals.{evaluator}.{name} = {value} must be at least {least}")


def tuple_of(evaluator: str, field: str, values, what: str, fits: Callable, least: int = 1):
  """Raises ValueError unless a field is a tuple of `what`, at least `least`, each of which fits."""
  if not isinstance(values, (tuple, list)) or len(values) < least or not all(map(fits, values)):
    raise ValueError(f"evals.{evaluator}.{field}={values} must be a tuple of {what}")


def counts(evaluator: str, field: str, values):
  """Raises ValueError unless a field is a tuple of whole numbers, at least 1, and not empty."""
  tuple_of(evaluator, field, values, "whole numbers, at least 1",
           lambda n: type(n) is int and n >= 1)


def all_known(evaluator: str, field: str, names: Iterable[str], known: Collection[str]):
  """Raises ValueError on the first of `names` that is not `known`, with the nearest that is."""
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(str(name), known, 1, 0)
      raise ValueError(f"evals.{evaluator}.{field}: {name!r} is not one of {', '.join(known)}; did "
                       f"you mean {near[0]!r}?")


# --- What the facts of a run tell before its first step -------------------------------------------
# `facts` is trainer.recipe.Facts; an evaluator's `check` gets it, and the fields of `evaluate`.

def has_split(facts, split: str | None = None, field: str = "split") -> int:
  """How many examples a split has, None being the evaluation split. ValueError if there is none."""
  sizes = facts.info.num_examples
  if split is None and facts.eval_split is None:
    raise ValueError(
      f"evals.{facts.name}: the data has no split to evaluate on (test, val, validation), only "
      f"{', '.join(sizes)}: set --config.data.eval_split={facts.train_split}, or "
      f"--config.evals.{facts.name}=none")
  all_known(facts.name, field, (split or facts.eval_split,), sizes)
  return sizes[split or facts.eval_split]


def has_prediction(facts, *names: str, field: str = "", pixels: bool = False):
  """Raises ValueError where the method lacks one of the predictions; `pixels` may be one or not."""
  for name in names:
    if name not in facts.predictions and not (pixels and name == "pixels"):
      said = f"evals.{facts.name}.{field} = {name!r}" if field else f"evals.{facts.name}"
      raise ValueError(f"{said} needs the prediction {name!r}, which this method has not; it has "
                       f"{', '.join(sorted(facts.predictions))}. "
                       f"--config.evals.{facts.name}=none leaves this evaluation out")


# --- What an evaluation finds ---------------------------------------------------------------------

def has_texts(evaluator: str, context):
  """Raises ValueError where the run has no tokenizer, so no texts."""
  if context.detokenize is None:
    raise ValueError(f"evals.{evaluator} needs texts: set data.tokenizer, for data that has them")


def num_classes(context, evaluator):
  """Number of classes of the data; a ValueError naming `evaluator` where it has no labels."""
  if not context.info.num_classes:
    raise ValueError(f"evals.{evaluator} needs labels; this data source has none")
  return context.info.num_classes


def unit(x):
  """x / |x| over the last axis, in NumPy or JAX as x is; a zero vector stays one."""
  xp = x.__array_namespace__()
  return x / xp.maximum(xp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def topk(scores, labels):
  """Top-1 accuracy, and top-5 where there are more than five classes, as `topk_correct` counts.

  Args:
    scores: [B, classes] array, higher is more likely.
    labels: int [B] array.

  Returns:
    {"top1": float, "top5": float}, in [0, 1].
  """
  from losses.accuracy import topk_correct  # here: most runs have no use for it
  ks = (1, 5) if scores.shape[1] > 5 else (1,)
  return {f"top{k}": float(np.mean(topk_correct(scores, labels, k))) for k in ks}
