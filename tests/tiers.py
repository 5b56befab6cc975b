"""What of a test's parameters is in the suite, and what only `-m slow` takes."""

import pytest


def suite(values, *positions: int, keys: tuple = (), unpack: bool = False):
  """The values of a sweep: those at `positions`, or in `keys`, in the suite, the others slow.

  `unpack`: each is a tuple, of a value for each of several names.
  """
  return [value if i in positions or value in keys else
          pytest.param(*(value if unpack else (value,)), marks=pytest.mark.slow)
          for i, value in enumerate(values)]
