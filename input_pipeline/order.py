"""Which example stands where: the endless sequence of epochs, by (seed, position) alone.

All randomness of the host is here: a stream of its own for each (seed, purpose, index).
"""

import functools
from collections.abc import Callable

import numpy as np

SHUFFLE, CROP, CROP_2, CAPTION, PERMUTE, SPREAD = range(6)  # the purposes of randomness


def generator(seed: int, purpose: int, index: int) -> np.random.Generator:
  """Counter-based: a stream of its own for each (seed, purpose, index), at no cost."""
  key = np.array([seed % 2**64, int(index)], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))


@functools.lru_cache(4)  # a batch touches two epochs at most, with favourites of two orders
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return generator(seed, SHUFFLE, epoch).permutation(n)


def entry(table: Callable, position: np.ndarray, n: int, seed: int) -> np.ndarray:
  """What stands at each position of the endless sequence of an epoch's tables of n entries."""
  epoch, offset = np.divmod(position, n)
  result = table(seed, int(np.max(epoch)), n)[offset]
  for e in np.unique(epoch)[:-1]:
    result = np.where(epoch == e, table(seed, int(e), n)[offset], result)
  return result


def shuffled(position: np.ndarray, *, n: int, seed: int) -> np.ndarray:
  """The example at each position of the endless sequence of epochs, each a permutation of n."""
  return entry(_permutation, position, n, seed)


def spread(n: int, limit: int) -> np.ndarray:
  """`limit` of n examples, by chance but for every run the same, in their order.

  The first of a sorted split would be of its first classes alone.
  """
  return np.sort(generator(0, SPREAD, n).choice(n, min(limit, n), replace=False, shuffle=False))


def pick(position: np.ndarray, *, n: int, seed: int, repeats: int = 1, favourites=None,
         share: float = 0.5) -> np.ndarray:
  """The training example at each position of the run, of n."""
  position = position // repeats
  if favourites is None:
    return shuffled(position, n=n, seed=seed)
  # Favourites come at equal distances: as many before a position as its share, rounded down.
  before, after = (np.floor((position + i) * share).astype(int) for i in (0, 1))
  return np.where(after > before,
                  favourites[shuffled(before, n=len(favourites), seed=seed)],
                  shuffled(position - before, n=n, seed=seed))
