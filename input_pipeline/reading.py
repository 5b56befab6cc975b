"""A whole split into memory, and batches made ahead of time.

What cannot be used is passed over, counted and told of, where the config says so.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from rich.progress import track

from input_pipeline.records import BadRecord, tell_skipped


def first_good(records, index: int, parse: Callable, on_error: str) -> tuple[int, dict]:
  """(its number, what `parse` makes of it) for a record or, skipping, the next good one."""
  for found in itertools.chain(range(index, len(records)), range(index)):
    try:
      return found, parse(records[found])
    except BadRecord as e:
      if on_error == "raise":
        raise
      error = e
  raise ValueError(f"no record of the split can be read: {error}")


def load(records, parse: Callable, name: str, example: Mapping[str, jax.ShapeDtypeStruct],
         on_error: str, tokens: Any | None) -> dict[str, np.ndarray]:
  """Reads a whole split into arrays, good records in the place of bad ones that are skipped.

  Each feature (n, ...) like `example` (1, ...), bad (n,) and, if any, captions int32 (n, m, l) and
  num_captions int32 (n,).
  """
  n, errors = len(records), {}
  arrays = {key: np.empty((n, *x.shape[1:]), x.dtype) for key, x in example.items()}

  def fill(start):
    texts = []
    for i, record in enumerate(records.__getitems__(range(start, min(start + 256, n))), start):
      try:
        row = parse(record)
      except BadRecord as e:
        errors[i] = e
        _, row = first_good(records, i, parse, on_error)
      for key, array in arrays.items():
        if row[key].shape != array.shape[1:]:
          raise ValueError(f"{record['name']} is {row[key].shape}, not {array.shape[1:]} like the "
                           "rest; set data.cache_bytes=0 and augment.image_size to have images "
                           "resized")
        array[i] = row[key]
      texts += [row["captions"]] if "captions" in row else []
    return texts

  starts = range(0, n, 256)
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    texts = list(itertools.chain.from_iterable(
      track(pool.map(fill, starts), f"decoding {name}", len(starts), transient=True,
            disable=len(starts) < 100)))
  tell_skipped([errors[i] for i in sorted(errors)], f"the {n} records of split {name!r}")
  arrays["bad"] = np.isin(np.arange(n), [*errors])
  if texts:
    from input_pipeline.captions import encode_captions
    arrays["captions"], arrays["num_captions"] = encode_captions(tokens, texts)
  return arrays


def prefetch(iterable: Iterable, depth: int) -> Iterator:
  """Yields from `iterable`, whose next `depth` items a thread makes meanwhile.

  What it raises comes out here, in its turn; the thread ends with this generator.
  """
  iterator, end = iter(iterable), object()
  with ThreadPoolExecutor(1) as pool:
    pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
    while (item := pending.popleft().result()) is not end:
      pending.append(pool.submit(next, iterator, end))
      yield item
