"""Linear probe: multinomial logistic regression on frozen features, fitted by L-BFGS."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluators import checks, knn


@jax.jit
def logits(params, x):
  """[B, D] features -> [B, classes], in full float32 on any device."""
  return jnp.matmul(x, params["kernel"], precision="highest") + params["bias"][None]


@jax.jit
def fit(params, x, labels, weights, l2, max_iters, tolerance):
  """Minimises sum_i weights_i CE(x_i kernel + bias, labels_i) + l2 / 2 |kernel|^2 by L-BFGS.

  Args:
    params: where to start: {"kernel": [D, classes], "bias": [classes]}.
    x: [M, D]; labels: int [M]; weights: [M], 0 leaves an example out.
    l2: strength of the penalty; the bias bears none.
    max_iters: of L-BFGS.
    tolerance: stop once the gradient's norm is below.

  Returns:
    (params, norm of the gradient there).
  """
  def objective(params):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)  # m
    return jnp.sum(weights * loss) + l2 / 2 * jnp.sum(params["kernel"]**2)

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)  # the line search's own, not anew

  def step(carry):
    params, opt = carry
    value, grad = value_and_grad(params, state=opt)
    updates, opt = solver.update(grad, opt, params, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(params, updates), opt

  def gradient_norm(opt):
    return optax.tree.norm(optax.tree.get(opt, "grad"))

  def unfinished(carry):
    count = optax.tree.get(carry[1], "count")
    return (count == 0) | ((count < max_iters) & (gradient_norm(carry[1]) > tolerance))

  params, opt = jax.lax.while_loop(unfinished, step, (params, solver.init(params)))
  return params, gradient_norm(opt)


def check(facts, l2, holdout, features, baselines, limit, **_):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, l2, holdout)
  if knn.check_representation(facts, features, baselines, limit) < 2:
    raise ValueError(f"evals.{facts.name}.limit = {limit}: one training example can not be split")


def ranges(evaluator: str, l2, holdout: float):
  checks.tuple_of(evaluator, "l2", l2, "positive numbers", lambda x: x > 0)
  if not 0 < holdout < 1:
    raise ValueError(f"evals.{evaluator}.holdout={holdout} must lie between 0 and 1")


def evaluate(context, features: str = "features", l2: tuple[float, ...] = (1e-1, 1e-2, 1e-3),
             max_iters: int = 100, tolerance: float = 1e-4, holdout: float = 0.1,
             baselines: tuple[str, ...] = (), limit: int | None = None):
  """Top-1 and top-5 on the evaluation split of a linear classifier fitted to the training split.

  Features are standardised by the training split. `l2` is chosen by top-1 on a held-out share of
  the TRAINING split, then the classifier is refitted to all of it.

  Args:
    features: name of a prediction that gives one vector an example.
    l2: strengths of weight decay that are tried.
    max_iters: steps of L-BFGS, at most.
    tolerance: norm of the gradient at which it stops.
    holdout: share of the training split that l2 is chosen by, in (0, 1).
    baselines: of "untrained" (the same network at initialisation) and "pixels".
    limit: training examples that are used, spread over the split; None = all.

  Returns:
    top1, top5 and the chosen l2, for the features and each baseline.

  Raises:
    ValueError: l2 or holdout out of range, an unknown baseline, data without labels.
  """
  ranges("linear_probe", l2, holdout)

  def score(x, labels, test_x, test_labels, classes):
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std = np.where(std > 1e-6 * std.max(), std, 1)  # a constant feature stays constant
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    x, test_x = (jnp.asarray((a - mean) / std, jnp.float32) for a in (x, test_x))
    shuffled = np.random.default_rng(context.seed).permutation(len(x))
    held_out = np.isin(np.arange(len(x)), shuffled[:max(1, round(holdout * len(x)))])

    def top(params, x, labels):
      return checks.topk(np.asarray(logits(params, x)), labels)

    def fit_to(kept, params, strength):  # weights, not a subset: one shape, so one compilation
      weights = jnp.asarray(kept / np.sum(kept), jnp.float32)
      return fit(params, x, labels, weights, strength, max_iters, tolerance)[0]

    params = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    best = (-1.0, None, None)
    for strength in sorted(l2, reverse=True):  # from strong to weak, each starts at the last
      params = fit_to(~held_out, params, strength)
      top1 = top(params, x[held_out], labels[held_out])["top1"]
      best = max(best, (top1, strength, params), key=lambda candidate: candidate[0])
    _, strength, params = best
    params = fit_to(np.ones(len(x), bool), params, strength)
    return top(params, test_x, test_labels) | {"l2": float(strength)}

  return knn.per_representation(context, "linear_probe", score, features, baselines, limit)
