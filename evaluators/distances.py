"""Distances between two sets of feature vectors [N, D], such as of real and generated images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def frechet(x, y):
  """Frechet distance of the Gaussians of both sets' moments (1706.08500 eq. 6), in float64.

  |mean_x - mean_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), covariances S over N - 1. With roots
  S = A^T A the last trace is the sum of the singular values of A_x A_y^T: nothing complex or
  negative arises, and any number of examples will do. Few of them exaggerate it nevertheless: each
  set should have many more examples than dimensions.
  """
  means, roots = [], []
  for a in (x, y):
    a = np.asarray(a, np.float64)
    means.append(a.mean(0))
    root = (a - means[-1]) / np.sqrt(len(a) - 1)                             # n d
    roots.append(np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root)
  cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
  spread = sum(np.sum(root**2) for root in roots) - 2 * cross
  return float(np.sum((means[0] - means[1])**2) + max(spread, 0.0))


def kernel(x, y, size=1000, seed=0):
  """Kernel distance: the unbiased squared MMD of the kernel (x . y / D + 1)^3 (1801.01401 sec. 4).

  The mean over random subsets without an example in common, so that these are independent and tell
  the estimate's standard error. Unlike the Frechet distance it is not larger with few examples; of
  equal distributions it may be negative.

  Args:
    x, y: [N, D] and [M, D] features, at least two of each.
    size: examples of a set in a subset, at most. There are at least 10 subsets, of 2 or more.
    seed: of the subsets.

  Returns:
    (estimate, its standard error; NaN of a single subset), computed in float64.
  """
  rng = np.random.default_rng(seed)
  subsets = min(max(10, -(-max(len(x), len(y)) // size)), len(x) // 2, len(y) // 2)
  parts = [np.array_split(rng.permutation(np.asarray(a, np.float64)), subsets) for a in (x, y)]

  def k(a, b):
    return (a @ b.T / a.shape[1] + 1)**3

  def within(a):
    """Mean of k over pairs of different examples."""
    matrix = k(a, a)
    return (matrix.sum() - np.trace(matrix)) / (len(a) * (len(a) - 1))

  values = [within(a) + within(b) - 2 * k(a, b).mean() for a, b in zip(*parts)]
  error = np.std(values, ddof=1) / np.sqrt(subsets) if subsets > 1 else np.nan
  return float(np.mean(values)), float(error)


def _squares(queries, bank):
  """(centred queries, centred bank, |q|^2, |b|^2): the origin amid them keeps rounding small."""
  queries, bank = (jnp.asarray(a, jnp.float32) for a in (queries, bank))
  mean = bank.mean(0)[None]
  queries, bank = queries - mean, bank - mean
  return queries, bank, jnp.sum(queries**2, 1), jnp.sum(bank**2, 1)


@functools.partial(jax.jit, static_argnames=("k", "block"))
def nearest(queries, bank, k, block=2**26):
  """The k examples of a bank [M, D] that are nearest to each query [Q, D], nearest first.

  Args:
    k: how many, <= M.
    block: numbers held at once, which bounds memory; the default takes 256 MiB.

  Returns:
    (Euclidean distances float32 [Q, k], places in the bank int32 [Q, k]).
  """
  queries, bank, _, bank_square = _squares(queries, bank)

  def one(query):
    product = jnp.matmul(bank, query, precision="highest")                   # m
    _, place = jax.lax.top_k(2 * product - bank_square, k)
    distance = jnp.linalg.norm(bank[place] - query[None], axis=-1)           # 0 of equal ones
    order = jnp.argsort(distance)
    return distance[order], place[order]

  size = max(1, block // (len(bank) + k * bank.shape[1]))
  return jax.lax.map(one, queries, batch_size=size)


@functools.partial(jax.jit, static_argnames=("block",))
def covered(queries, bank, radii, block=2**26):
  """Which queries [Q, D] lie in the ball of any example of a bank [M, D]; bool [Q].

  `radii` [M] are the balls'. What exceeds one by rounding alone is inside; `block` as in `nearest`.
  """
  queries, bank, query_square, bank_square = _squares(queries, bank)

  def one(query):
    query, square = query
    product = jnp.matmul(bank, query, precision="highest")                   # m
    sums = square + bank_square
    return jnp.any(sums - 2 * product <= radii**2 + 1e-6 * sums)

  return jax.lax.map(one, (queries, query_square), batch_size=max(1, block // len(bank)))


def precision_recall(real, fake, k=3):
  """Improved precision and recall (1904.06991 eq. 1 and 2), each in [0, 1].

  A set's manifold is the union of balls around its examples that reach to their k-th neighbours.
  Precision is the share of `fake` in the manifold of `real`, recall that of `real` in `fake`'s.
  Both grow as a manifold's set grows, so sets of one size compare best.
  """
  def share(queries, bank):
    radii = nearest(bank, bank, k + 1)[0][:, -1]                             # itself is the first
    return float(np.mean(covered(queries, bank, radii)))

  return share(fake, real), share(real, fake)
