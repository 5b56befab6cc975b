"""Batches of records that are decoded as they are read, by threads or workers.

What cannot be used is passed over, counted and told of, where the config says so.
"""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from input_pipeline.reading import first_good
from input_pipeline.records import BadRecord, tell_skipped


def read(reader: Any, split: str, numbers: range, batch_size: int, rows: np.ndarray,
         index_of: Callable, is_train: bool) -> Iterator[dict[str, np.ndarray]]:
  """What `batches.Reader.read` gives, of a split that is decoded as it is read."""
  records, on_error = reader.splits[split], reader.options.on_error
  most = 0
  if reader.texts:
    from input_pipeline.captions import encode_captions, most_captions
    most = most_captions(records) if numbers and not is_train else 0
  permuted = is_train and reader.other is not None

  def example(i):
    number, row = divmod(i, len(rows))
    position = (numbers.start + number) * batch_size + rows[row]
    index = int(index_of(position))
    found, arrays = first_good(records, index, functools.partial(
      reader.parse, looks=reader.looks(position, is_train),
      coarse=is_train and reader.native is None), on_error)
    if permuted:
      _, told = first_good(records, int(reader.other[index]), reader.parse, on_error)
      arrays["captions"] = told["captions"]
    if "captions" in arrays:
      ids, count = encode_captions(reader.tokenizer, [arrays["captions"]], most)
      arrays |= {"captions": ids[0], "num_captions": count[0]}
    arrays["bad"] = np.bool(found != index)
    told = {} if on_error == "raise" else {
      "skipped": np.int32(index if arrays["bad"] else -1)}
    return reader.finish(arrays, position, split, is_train) | told
  made = stream(example, len(numbers), len(rows), reader.options.workers,
                reader.options.prefetch_batches)
  if on_error == "raise":
    return made
  return tell(made, records, reader.parse, split, reader.skipped[split])


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
