"""Few-shot linear evaluation: least squares on frozen features (2010.11929 sec. 4.1)."""

import numpy as np

from evaluators import checks, knn


def fit(x, labels, classes: int, l2: float):
  """Ridge regression from features to {-1, 1}^classes, in closed form and float64.

  Minimises |x kernel + bias - y|^2 + l2 D |kernel|^2, the bias free. Of the two equal solutions the
  smaller system is solved, of D or of M equations.

  Args:
    x: [M, D] features; labels: int [M].
    l2: strength of the penalty for each dimension, > 0.

  Returns:
    (kernel [D, classes], bias [classes]).
  """
  x, y = np.asarray(x, np.float64), np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
  x_mean, y_mean, (m, d) = x.mean(0), y.mean(0), x.shape
  x, y, ridge = x - x_mean, y - y_mean, l2 * d * np.eye(min(m, d))
  if d <= m:
    kernel = np.linalg.solve(x.T @ x + ridge, x.T @ y)                       # d classes
  else:
    kernel = x.T @ np.linalg.solve(x @ x.T + ridge, y)
  return kernel, y_mean - x_mean @ kernel


def check(facts, shots, draws, l2, features, baselines, limit):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, shots, draws, l2)
  n = knn.check_representation(facts, features, baselines, limit)
  enough(facts.name, shots, fewest_of_a_class(facts, limit), n)


def fewest_of_a_class(facts, limit: int | None) -> int:
  """At most how many of `limit` training examples the rarest class has.

  Exact where the records are in memory; else what many classes must share.
  """
  classes, n = facts.info.num_classes, facts.info.num_examples[facts.train_split]
  labels = [row["label"] for row in facts.records(facts.train_split, limit)]
  if labels:
    return int(np.bincount(labels, minlength=classes).min())
  return (n if limit is None else min(n, limit)) // classes


def ranges(evaluator: str, shots, draws: int, l2: float):
  checks.counts(evaluator, "shots", shots)
  if draws < 2 or not l2 > 0:
    raise ValueError(f"evals.{evaluator}: draws={draws} and l2={l2} must be at least 2 and above 0")


def enough(evaluator: str, shots, fewest: int, n: int):
  """Raises ValueError where the rarest class, of `fewest` of `n` examples, has fewer than shots."""
  if fewest < max(shots):
    raise ValueError(f"evals.{evaluator}.shots={shots}: a class has only {fewest} of the {n} "
                     "training examples used")


def evaluate(context, shots: tuple[int, ...] = (5, 10), draws: int = 5, l2: float = 1.0,
             features: str = "features", baselines: tuple[str, ...] = (), limit: int | None = None):
  """Top-1 on the evaluation split of `fit` to a few examples of each class.

  The examples are drawn from the training split by the run's seed: those of fewer shots are the
  first of those of more, and all representations get the same. They standardise the features too.

  Args:
    shots: numbers of examples a class.
    draws: how many sets of examples, at least 2.
    l2: see `fit`.
    features: name of a prediction that gives one vector an example.
    baselines: of "untrained" (the same network at initialisation) and "pixels".
    limit: training examples that are used, spread over the split; None = all.

  Returns:
    {n}shot/top1, the mean over the draws, and {n}shot/top1_std, their standard deviation.

  Raises:
    ValueError: numbers out of range, a class with fewer examples than shots, an unknown baseline,
      data without labels.
  """
  ranges("few_shot", shots, draws, l2)

  def score(x, labels, test_x, test_labels, classes):
    enough("few_shot", shots, np.bincount(labels, minlength=classes).min(), len(x))
    top1 = np.zeros((len(shots), draws))
    for draw in range(draws):
      order = np.random.default_rng((context.seed, draw)).permutation(len(x))
      order = order[np.argsort(labels[order], kind="stable")]                # class by class
      place = np.concatenate([np.arange(n) for n in np.bincount(labels)])    # within its class
      for row, n in zip(top1, shots):
        chosen = order[place < n]
        few = np.asarray(x[chosen], np.float64)
        mean, std = few.mean(0), few.std(0)
        std = np.where(std > 1e-6 * std.max(), std, 1)  # a constant feature stays constant
        kernel, bias = fit((few - mean) / std, labels[chosen], classes, l2)
        kernel = kernel / std[:, None]
        scores = test_x.astype(np.float64) @ kernel + (bias - mean @ kernel)  # b classes
        row[draw] = checks.topk(scores, test_labels)["top1"]
    return {f"{n}shot/{key}": value for n, row in zip(shots, top1) for key, value in
            (("top1", row.mean()), ("top1_std", row.std(ddof=1)))}

  return knn.per_representation(context, "few_shot", score, features, baselines, limit)
