"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 1805.01978, 3.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from evaluators import checks

BASELINES = ("untrained", "pixels")


def check_representation(facts, features: str, baselines: tuple[str, ...],
                         limit: int | None) -> int:
  """What `per_representation` needs, before any step. Returns how many training examples it uses.

  Raises ValueError: no labels, no evaluation split, no such prediction or baseline.
  """
  checks.num_classes(facts, facts.name)
  checks.has_split(facts)
  checks.has_prediction(facts, features, field="features", pixels=True)
  checks.all_known(facts.name, "baselines", baselines, BASELINES)
  checks.at_least(facts.name, limit=(limit, 1))
  n = facts.info.num_examples[facts.train_split]
  return n if limit is None else min(n, limit)


def per_representation(context, evaluator, score, features, baselines, limit):
  """Scores the trained features, then each baseline under its own prefix.

  Args:
    context: the evaluator's context.
    evaluator: its name, for errors.
    score: (train features, train labels, test features, test labels, classes) -> metrics.
    features: name of a prediction that returns [B, D].
    baselines: of "untrained" (the same network at initialisation) and "pixels".
    limit: how many training examples to use, spread over the split; None is all.

  Returns:
    Metrics; a baseline's begin with "untrained/" or "pixels/".
  """
  classes = checks.num_classes(context, evaluator)
  checks.all_known(evaluator, "baselines", baselines, BASELINES)
  metrics = {}
  for source in ("trained", *baselines):
    name, params = ("pixels", None) if source == "pixels" else (features, source)
    sets = []
    for split, most in ((context.train_split, limit), (context.eval_split, None)):
      x, batch = context.collect(name, split, "label", params=params, limit=most)
      if np.ndim(x) != 2:
        raise ValueError(f"evals.{evaluator}.features={name!r} must return one vector [B, D] for "
                         f"each example, not {jax.tree.map(np.shape, x)}")
      sets += [x, batch["label"]]
    prefix = "" if source == "trained" else f"{source}/"
    metrics |= {prefix + key: value for key, value in score(*sets, classes).items()}
  return metrics


@functools.partial(jax.jit, static_argnames=("k", "classes", "block"))
def votes(bank, labels, queries, temperature, *, k, classes, block=2**26):
  """Log votes for each class among the k nearest of `bank` by cosine similarity s.

  A neighbour's vote weighs exp(s / temperature), relative to the nearest so as not to overflow.

  Args:
    bank: [M, D] features, `labels` int [M] theirs.
    queries: [B, D].
    temperature: of the weights, > 0.
    k: neighbours, <= M.
    classes: number of classes.
    block: similarities held at once, which bounds memory; the default takes 256 MiB.

  Returns:
    float32 [B, classes]; -inf for a class none of the neighbours has.
  """
  bank = checks.unit(bank.astype(jnp.float32))

  def vote(query):
    s = jnp.matmul(bank, checks.unit(query.astype(jnp.float32)), precision="highest")  # m
    s, nearest = jax.lax.top_k(s, k)  # k
    weights = jnp.exp((s - s[0]) / temperature)
    return jnp.log(jnp.zeros(classes).at[labels[nearest]].add(weights))  # classes

  return jax.lax.map(vote, queries, batch_size=max(1, block // len(bank)))


def check(facts, k, temperature, features, baselines, limit):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, k, temperature, check_representation(facts, features, baselines, limit))


def ranges(evaluator: str, k: int, temperature: float, bank: int):
  if not temperature > 0:
    raise ValueError(f"evals.{evaluator}.temperature={temperature} must be positive")
  if not 1 <= k <= bank:
    raise ValueError(f"evals.{evaluator}.k={k} must lie in 1..{bank}, the training examples used")


def evaluate(context, k: int = 20, temperature: float = 0.07, features: str = "features",
             baselines: tuple[str, ...] = (), limit: int | None = None):
  """Top-1 and top-5 of k-nearest neighbours from the training split on the evaluation split.

  Args:
    k: neighbours.
    temperature: of their votes, above 0.
    features: name of a prediction that gives one vector an example.
    baselines: of "untrained" (the same network at initialisation) and "pixels".
    limit: training examples that are used, spread over the split; None = all.

  Raises:
    ValueError: k or temperature out of range, an unknown baseline, data without labels.
  """
  def score(bank, bank_labels, queries, labels, classes):
    ranges("knn", k, temperature, len(bank))
    scores = votes(bank, bank_labels, queries, temperature, k=k, classes=classes)
    return checks.topk(np.asarray(scores), labels)

  return per_representation(context, "knn", score, features, baselines, limit)
