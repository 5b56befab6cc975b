"""Distances of feature sets: closed forms, SciPy's matrix root, loops, sets made by hand."""

import numpy as np
import pytest
import scipy.linalg

from evaluators import distances


def with_moments(rng, n, mean, covariance):
  """n rows with exactly this mean and this covariance (over n - 1)."""
  z = rng.standard_normal((n, len(mean)))
  z -= z.mean(0)
  z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
  return mean + z @ np.linalg.cholesky(covariance).T


def random_covariance(rng, d):
  a = rng.standard_normal((d, d))
  return a @ a.T + 0.1 * np.eye(d)


# Frechet distance

def test_frechet_of_independent_coordinates():
  rng = np.random.default_rng(0)
  means, stds = rng.standard_normal((2, 6)), rng.uniform(0.1, 3, (2, 6))
  x, y = (with_moments(rng, 50, m, np.diag(s**2)) for m, s in zip(means, stds))
  expected = np.sum((means[0] - means[1])**2) + np.sum((stds[0] - stds[1])**2)
  np.testing.assert_allclose(distances.frechet(x, y), expected, rtol=1e-10)
  np.testing.assert_allclose(distances.frechet(x, x), 0, atol=1e-10)


@pytest.mark.parametrize("d", [5, 300])  # more dimensions than examples: all covariances singular
def test_frechet_against_the_matrix_root(d):
  rng = np.random.default_rng(1)
  means, covariances = rng.standard_normal((2, 5)), [random_covariance(rng, 5) for _ in range(2)]
  sets = [with_moments(rng, n, *m) for n, m in zip((40, 70), zip(means, covariances))]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  expected = (np.sum((means[0] - means[1])**2)
              + np.trace(covariances[0] + covariances[1] - 2 * root))
  turn = np.linalg.qr(rng.standard_normal((d, 5)))[0]  # distances stay as they are
  actual = distances.frechet(*(x @ turn.T for x in sets))
  np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_frechet_of_small_differences_of_float32_features():
  x = np.random.default_rng(2).standard_normal((500, 20)).astype(np.float32) + 300
  np.testing.assert_allclose(distances.frechet(x, x + np.float32(2**-6)), 20 * 2**-12, rtol=1e-6)


# kernel distance

def test_kernel_of_one_subset_against_a_loop():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)) + 1
  def k(a, b):
    return (sum(p * q for p, q in zip(a, b)) / 4 + 1)**3
  pairs = [(i, j) for i in range(3) for j in range(3)]
  expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 6
              - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 9)
  actual, error = distances.kernel(x, y)
  np.testing.assert_allclose(actual, expected, rtol=1e-10)
  assert np.isnan(error)


@pytest.mark.parametrize("shift, size, n", [(0, 1000, 60), (0.3, 1000, 60), (0.3, 3, 60),
                                            (0, 1000, 4)])
def test_kernel_is_unbiased_and_knows_its_error(shift, size, n):
  """Of one number the kernel's features are 1, x, x^2 and x^3, so the distance is of 3 moments."""
  def moments(m, s=0.5):
    return np.array([m, m**2 + s**2, m**3 + 3 * m * s**2])  # of N(m, s^2)
  expected = np.sum([3, 3, 1] * (moments(0) - moments(shift))**2)
  rng = np.random.default_rng(3)
  draws = np.array([distances.kernel(0.5 * rng.standard_normal((n, 1)),
                                     0.5 * rng.standard_normal((n + 1, 1)) + shift, size)
                    for _ in range(400)])
  spread = draws[:, 0].std() / np.sqrt(len(draws))
  # Were pairs of an example with itself counted, each set would add about 0.25.
  assert abs(draws[:, 0].mean() - expected) < 4 * spread < 6 / n
  np.testing.assert_allclose(np.sqrt(np.mean(draws[:, 1]**2)), draws[:, 0].std(), rtol=0.15)


def test_kernel_does_not_depend_on_the_order_of_classes():
  x = np.repeat(np.eye(10), 20, axis=0)  # sorted by class
  value, _ = distances.kernel(x, x[::-1])
  assert abs(value) < 0.1 * distances.kernel(x, x[:100])[0]


# neighbours, precision and recall

@pytest.mark.parametrize("block", [1, 700, 2**26])
def test_nearest_against_sorting(block):
  rng = np.random.default_rng(0)
  bank = (rng.standard_normal((90, 7)) + 50).astype(np.float32)
  queries = np.concatenate([rng.standard_normal((30, 7)) + 50, bank[[4, 8]]]).astype(np.float32)
  exact = np.linalg.norm(queries[:, None].astype(np.float64) - bank[None], axis=-1)
  distance, place = distances.nearest(queries, bank, 4, block=block)
  np.testing.assert_array_equal(place, np.argsort(exact, axis=1)[:, :4])
  np.testing.assert_allclose(distance, np.sort(exact, axis=1)[:, :4], rtol=1e-4)
  np.testing.assert_array_equal(distance[-2:, 0], 0)


def test_precision_and_recall_of_sets_made_by_hand():
  real = np.arange(10.0)[:, None]  # with k = 1 each ball reaches its neighbours: [-1, 10]
  fake = np.array([-0.9, 4.5, 4.6, 9.9, 10.1, 30.0])[:, None]
  # Balls of fake: -0.9 +- 5.4, 4.5 and 4.6 +- 0.1, 9.9 and 10.1 +- 0.2, 30 +- 19.9: 0 to 4 of real.
  assert distances.precision_recall(real, fake, k=1) == (pytest.approx(4 / 6), pytest.approx(0.5))
  # Balls of radius 0, which rounding must not empty.
  twins = np.repeat(np.random.default_rng(0).standard_normal((20, 50)), 4, axis=0) + 100
  assert distances.precision_recall(twins, twins[::-1], k=3) == (1, 1)
  assert distances.precision_recall(twins, twins + 0.1, k=3) == (0, 0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_against_float64(k):
  rng = np.random.default_rng(k)
  real, fake = rng.standard_normal((60, 8)), 0.7 * rng.standard_normal((80, 8)) + 0.5

  def share(queries, bank):
    radius = [sorted(np.linalg.norm(bank - b, axis=1))[k] for b in bank]
    return np.mean([any(np.linalg.norm(q - b) <= r for b, r in zip(bank, radius)) for q in queries])
  precision, recall = distances.precision_recall(real, fake, k)
  assert (precision, recall) == (pytest.approx(share(fake, real)), pytest.approx(share(real, fake)))
  assert 0 < recall < precision < 1
