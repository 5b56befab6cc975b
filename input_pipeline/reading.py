"""Records to arrays: a whole split into memory, or batches as they are read, by threads or workers.

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


def tell(batches: Iterator[dict], records, parse: Callable, name: str,
         known: dict[int, BadRecord]) -> Iterator[dict]:
  """Takes "skipped" out of the batches; warns of the first bad record and, at the end, of all.

  `known` are those that were met before, and gets the others.
  """
  before = len(known)
  try:
    for batch in batches:
      for i in sorted(set(batch.pop("skipped").tolist()) - {-1, *known}):
        try:
          parse(records[i])  # once more: only the process that read it knows what it was
        except BadRecord as e:
          known[i] = e
          if len(known) == 1:
            tell_skipped([e], f"the {len(records)} records of split {name!r} so far")
      yield batch
  finally:
    batches.close()
    if len(known) > max(before, 1):
      tell_skipped([*known.values()], f"the {len(records)} records of split {name!r}")


def stream(example: Callable[[int], dict], num_batches: int, batch_size: int, workers: int,
           ahead: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of example(0), example(1), ... in order: by threads, or by workers, which are grain's.

  What an example raises comes out in the place of its batch.
  """
  if not workers:
    yield from _stream(example, num_batches, batch_size, ahead)
    return
  import grain  # only where it is asked for: it takes a second to load
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # a notebook parses none, but grain's workers ask for theirs
  # Batched before the split among workers: whole batches, each made by one of them.
  iterator = iter(
    grain.MapDataset.range(num_batches * batch_size).map(example).batch(batch_size)
    .to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead))
    .map(lambda batch: {key: np.array(a) for key, a in batch.items()}))  # out of shared memory
  try:
    yield from iterator
  finally:
    iterator.close()  # ends the workers


def _stream(example, num_batches, batch_size, ahead):
  """By threads, eight examples at a time: one at a time, as grain has them, costs 80 us each."""
  rows = (range(n * batch_size, (n + 1) * batch_size) for n in range(num_batches))
  parts = (batch[i:i + 8] for batch in rows for i in range(0, batch_size, 8))
  pool = ThreadPoolExecutor(os.cpu_count())
  futures = (pool.submit(lambda part: [*map(example, part)], part) for part in parts)
  pending = deque(itertools.islice(futures, -(-batch_size // 8) * ahead + os.cpu_count()))
  try:
    for _ in range(num_batches):
      made = []
      while len(made) < batch_size:
        made += pending.popleft().result()
        pending.extend(itertools.islice(futures, 1))
      yield {key: np.stack([row[key] for row in made]) for key in made[0]}
  finally:
    pool.shutdown(cancel_futures=True)


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
