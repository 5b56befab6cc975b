"""From records to host batches: which examples make batch n, and two ways to read them.

Batch n of a run holds the positions n*B .. (n+1)*B - 1 of an endless sequence of epochs, so it
follows from (seed, n) alone: not from where reading began, nor from how many processes or workers
share it. Small data is decoded once and gathered from memory; the rest is decoded as it is read.
"""

import functools
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from rich.progress import track

from input_pipeline import geometry, sources, text
from input_pipeline.splits import with_parts

IMAGES = ("image", "image_2")  # of a batch, by view
SHUFFLE, CROP, CROP_2, CAPTION, PERMUTE = range(5)  # the purposes of randomness


class Data(NamedTuple):
  """The batches of a source; each is a dict of NumPy arrays: image uint8 (b, h, w, c), label (b,).

  With a tokenizer also text, int32 (b, l): in training one of the image's captions, drawn anew
  each time; in evaluation the first, and besides captions (b, m, l), of which the first
  num_captions (b,) are the image's and the rest padding. Of latents, image is float32 as
  `sources.read_latent` gives it.

  `rows`, a slice or an index array, are the rows of the global batch that this process holds.
  """
  info: sources.Info
  train: Callable  # (start, stop, rows=None) -> iterator over the batches start .. stop - 1
  eval: Callable  # (split=None, batch_size, rows=None) -> iterator, each example once, in order;
  #                 "valid" (b,) is False on bad records and on rows that fill up the last batch
  spec: dict[str, jax.ShapeDtypeStruct]  # of the global training batch
  train_split: str
  eval_split: str | None
  tokenizer: text.Tokenizer | None


def make(source: str, *, batch_size: int, data_dir: str | None = None, seed: int = 0,
         views: Sequence[geometry.View] = (geometry.View(),), train_split: str = "train",
         eval_split: str | None = None, cache_bytes: int = 2**30, workers: int = 0,
         prefetch_batches: int = 2, repeats: int = 1,
         on_error: Literal["raise", "skip"] = "raise",
         latents: Literal[*sources.LATENTS] | None = None,
         tokenizer: str | None = None, context: int = 64, vocab_size: int = 1024,
         lower_case: bool = False, eos_id: int | None = None, pad_id: int | None = None,
         mask_token: bool = False, permute_text: bool = False, favour: str | None = None,
         favour_share: float = 0.5, held_out: float = 0.05) -> Data:
  """Makes the batches of a source.

  A split whose decoded images are all of one size and fit in `cache_bytes` is held in memory at
  that size; any other is streamed. Both are cropped and resized here, to the same pixels.

  Args:
    source, data_dir: see `sources.open_source`.
    batch_size: of the global training batch, at most the number of training examples.
    seed: of the order, the crops and the choice of captions.
    views: how images are cut; a second one gives training batches "image_2". A size of None is
      that of the images, if all have one. Latents are neither cropped nor resized.
    train_split, eval_split: a split, or a part of one such as "train[:99%]". The second is what
      `eval` reads if it is asked for no split; None = test, val or validation.
    cache_bytes: for the decoded images of one split; 0 = always stream.
    workers: processes that decode when streaming; 0 = threads of this process.
    repeats: times that an example is drawn in a row, augmented anew (1901.09335).
    prefetch_batches: batches (when streaming: of each worker) made ahead.
    on_error: "raise" on a record that cannot be used, or "skip" it and warn: in training the next
      good one of the split stands in for it, in evaluation it is not valid. Bad rows of a metadata
      file are left out altogether.
    latents: where an autoencoder's arrays stand in the place of images, what they hold: "mean",
      "mean_std" or "moments", see `sources.read_latent`.
    tokenizer: "bytes", "bpe", which is trained on the captions of `train_split` (a spread of
      100,000 examples if there are more), or PATH.json; None = no text.
    context, vocab_size, lower_case, eos_id, pad_id, mask_token: see `text.make`.
    permute_text: whether each training image has the captions of another, always the same one, so
      that nothing can be learnt: for control.
    favour, favour_share: regular expression, and share of the training examples that are those
      with a caption that it matches from the start, in an order of their own. None = no favourites.
    held_out: share of the lines of a file of texts that are the split "test", (0, 1).

  Raises:
    ValueError, FileNotFoundError: a field of the configuration or a record that does not do.
  """
  splits, info = sources.open_source(source, data_dir, on_error, latents, held_out)
  splits = with_parts(splits, (train_split, eval_split))
  info = info._replace(num_examples={name: len(records) for name, records in splits.items()})
  if eval_split is None:
    eval_split = next((s for s in ("test", "val", "validation") if s in splits), None)
  _check_split("data.train_split", train_split, splits)
  if eval_split is not None:
    _check_split("data.eval_split", eval_split, splits)
  n = info.num_examples[train_split]
  _check_least("data.batch_size", batch_size, 1)
  if batch_size > n:
    raise ValueError(f"data.batch_size={batch_size} is larger than the {n} examples of split "
                     f"{train_split!r}")
  _check_least("data.workers", workers, 0)
  _check_least("data.repeats", repeats, 1)
  _check_least("data.prefetch_batches", prefetch_batches, 1)
  height, width, channels = info.image_shape
  native = None if height is None or width is None else (height, width)
  views = _at_size(views, native)
  if latents and (len(views) > 1 or any(
      geometry.moves(views[0], *native, is_train) for is_train in (True, False))):
    raise ValueError(f"augment: the latents of {source!r} are {native[0]}x{native[1]} and are not "
                     "cropped or resized: set no other image_size, no crop_area, no second_view")

  for field, value in {"tokenizer": tokenizer, "favour": favour}.items():
    if value is not None and "text" not in splits[train_split][0]:
      has = sorted(splits[train_split][0].keys() - {"name"})
      raise ValueError(f"data.{field}={value!r} needs captions, but split {train_split!r} of "
                       f"{source!r} has {' and '.join(has)} only")
  tokens = None if tokenizer is None else text.make(
    tokenizer, itertools.chain.from_iterable(read_captions(splits[train_split], on_error, 100_000)),
    context=context, vocab_size=vocab_size, lower_case=lower_case, eos_id=eos_id, pad_id=pad_id,
    mask_token=mask_token)
  favourites = None if favour is None else find_favourites(
    read_captions(splits[train_split], on_error), favour, favour_share)
  other = derangement(n, seed) if tokens and permute_text else None

  skipped = {split: {} for split in splits}  # record number -> error, of what was streamed so far

  def is_cached(split: str) -> bool:
    example = make_spec(1, native, channels, latents=latents)["image"] if native else None
    return bool(example) and info.num_examples[split] * example.size * example.dtype.itemsize <= (
      cache_bytes)

  def parse(record, looks=(), coarse=False) -> dict[str, np.ndarray]:
    """A record as arrays: what is seen of it, or all; its label, captions. Raises BadRecord."""
    if latents:
      result = {"image": sources.read_latent(record, latents)}
    elif looks and record["image"] is not None:
      result = dict(zip(IMAGES, sources.decode_looks(record, channels, looks, coarse)))
    else:
      result = {"image": sources.decode(record, channels)}
    if "label" in record:
      result["label"] = np.int32(record["label"])
    if tokens and "text" in record:
      result["captions"] = sources.captions(record)
    return result

  @functools.cache
  def cache(split: str) -> dict[str, np.ndarray]:
    example = make_spec(1, native, channels, latents=latents)["image"]
    return load(splits[split], parse, split, example, on_error, tokens)

  def read(split, numbers, batch_size, rows, index_of, looks_of, is_train):
    rows = np.arange(batch_size)[slice(None) if rows is None else rows]

    def finish(arrays, position):
      """The arrays of the batch, or of the example, at `position`."""
      bad = arrays.pop("bad")
      if not is_train:
        arrays["valid"] = (position < info.num_examples[split]) & ~bad
      if "captions" in arrays:
        captions, count = arrays["captions"], arrays["num_captions"]
        drawn = (uniform(position, n=n, seed=seed) * count).astype(int) if is_train else 0 * count
        arrays["text"] = np.take_along_axis(captions, drawn[..., None, None], -2)[..., 0, :]  # b l
        if is_train:
          del arrays["captions"], arrays["num_captions"]
      return arrays

    if is_cached(split):
      arrays = cache(split) if numbers else {}

      def gather(number):
        position = number * batch_size + rows
        index = index_of(position)
        text_of = other[index] if is_train and other is not None else index
        batch = {key: np.take(a, text_of if "captions" in key else index, axis=0)
                 for key, a in arrays.items()}
        return finish(see_all(batch, [*map(looks_of, position)]), position)
      return prefetch(map(gather, numbers), prefetch_batches)

    records = splits[split]
    most = most_captions(records) if numbers and not is_train else 0

    def example(i):
      number, row = divmod(i, len(rows))
      position = (numbers.start + number) * batch_size + rows[row]
      index = int(index_of(position))
      found, arrays = first_good(records, index, functools.partial(
        parse, looks=looks_of(position), coarse=is_train and native is None), on_error)
      if is_train and other is not None:
        arrays["captions"] = first_good(records, int(other[index]), parse, on_error)[1]["captions"]
      if "captions" in arrays:
        ids, count = encode_captions(tokens, [arrays["captions"]], most)
        arrays |= {"captions": ids[0], "num_captions": count[0]}
      arrays["bad"] = np.bool(found != index)
      told = {"skipped": np.int32(index if arrays["bad"] else -1)} if on_error == "skip" else {}
      return finish(arrays, position) | told
    made = stream(example, len(numbers), len(rows), workers, prefetch_batches)
    return tell(made, records, parse, split, skipped[split]) if on_error == "skip" else made

  def pick(position):
    """The training example at each position of the run."""
    position = position // repeats
    if favour is None:
      return shuffled(position, n=n, seed=seed)
    # Favourites come at equal distances: as many before a position as its share, rounded down.
    before, after = (np.floor((position + i) * favour_share).astype(int) for i in (0, 1))
    return np.where(after > before,
                    favourites[shuffled(before, n=len(favourites), seed=seed)],
                    shuffled(position - before, n=n, seed=seed))

  def train(start: int, stop: int, rows=None) -> Iterator[dict[str, np.ndarray]]:
    def looks_of(position):
      return [geometry.Look(functools.partial(
        geometry.for_training, view, _generator(seed, purpose, position)), view.interpolation,
        exact=False) for view, purpose in zip(views, (CROP, CROP_2))]
    return read(train_split, range(start, stop), batch_size, rows, pick,
                looks_of if cut else lambda position: (), True)

  def evaluate(split: str | None = None, batch_size: int = batch_size, rows=None):
    split = eval_split if split is None else split
    _check_split("split", split, splits)
    _check_least("batch_size", batch_size, 1)
    count = info.num_examples[split]
    return read(split, range(-(-count // batch_size)), batch_size, rows,
                lambda position: np.where(position < count, position, 0),
                lambda _: [centre] if _any_moves(views[:1], native, is_train=False) else (), False)

  centre = geometry.Look(functools.partial(geometry.for_evaluation, views[0]),
                         views[0].interpolation)
  cut = _any_moves(views, native, is_train=True)
  spec = make_spec(batch_size, views[0].image_size, channels, info.num_classes, tokens,
                   len(views) if cut else 1, latents)
  return Data(info, train, evaluate, spec, train_split, eval_split, tokens)


def _at_size(views: Sequence[geometry.View], native) -> list[geometry.View]:
  """The views, with the images' own size where they say none."""
  if native is None and any(view.image_size is None for view in views):
    raise ValueError("augment.image_size=None, but the images are of several sizes: set it")
  return [view._replace(image_size=view.image_size or native) for view in views]


def _any_moves(views: Sequence[geometry.View], native, is_train: bool) -> bool:
  """Whether any view is not of whole images as large as they are."""
  return native is None or any(geometry.moves(view, *native, is_train) for view in views)


def see_all(batch: dict[str, np.ndarray], looks: list) -> dict[str, np.ndarray]:
  """A batch with what is seen of its images; nothing changes where there is nothing to look at."""
  if not looks or not looks[0]:
    return batch

  def rows(part):
    return [[geometry.see_array(batch["image"][i], look) for look in looks[i]] for i in part]

  parts = [range(i, min(i + 8, len(looks))) for i in range(0, len(looks), 8)]
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    seen = [*itertools.chain.from_iterable(pool.map(rows, parts))]
  return batch | {name: np.stack(images) for name, images in zip(IMAGES, zip(*seen))}


def make_spec(batch_size: int, size: tuple[int, int], channels: int, num_classes: int = 0,
              tokens: text.Tokenizer | None = None, views: int = 1,
              latents: str | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a global training batch."""
  stored = channels * (2 if latents in ("mean_std", "moments") else 1)
  image = jax.ShapeDtypeStruct((batch_size, *size, stored), np.float32 if latents else np.uint8)
  spec = dict.fromkeys(IMAGES[:views], image)
  if num_classes:
    spec["label"] = jax.ShapeDtypeStruct((batch_size,), np.int32)
  if tokens:
    spec["text"] = jax.ShapeDtypeStruct((batch_size, tokens.context), np.int32)
  return spec


def stand_in(source: str, batch_size: int, image_size=None, channels: int | None = None,
             num_classes: int | None = None, train_examples: int = 1_281_167,
             views: int = 1, latents: str | None = None, tokenizer: str | None = None,
             **text_options) -> Data:
  """Data that has shapes and cannot be read: for planning a run where its data set is not.

  The embedded source knows its own shapes; of others the caller has to say them. `text_options`
  are those of `text.make`; its "bpe" has its shapes without having seen a caption.

  Raises:
    ValueError: the image size, channels or number of classes is not known.
  """
  if source.split("/")[0] == "glyphs":
    native, channels, num_classes = sources.glyphs_shape(source)
    size = image_size or native
  elif source.startswith("lines:"):
    size, channels, num_classes = 1, 1, 0
  else:
    unknown = [field for field, value in {
      "augment.image_size": image_size, "model.channels": channels,
      "model.num_classes": num_classes}.items() if value is None]
    if unknown:
      raise ValueError(f"without the data of {source!r}, the config must say {', '.join(unknown)}")
    size = image_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  tokens = None if tokenizer is None else text.make(tokenizer, **text_options)
  spec = make_spec(batch_size, size, channels, num_classes, tokens, views, latents)
  info = sources.Info((*size, channels), num_classes, (), {"train": train_examples}, "")
  return Data(info, None, None, spec, "train", None, tokens)


def _check_split(field: str, split: str, splits) -> None:
  if split not in splits:
    raise ValueError(f"{field}={split!r} is not a split; {sources.nearest(str(split), (*splits,))}")


def _check_least(field: str, value: int, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{field}={value!r}; it must be a whole number >= {least}")


# The order ---------------------------------------------------------------------------------------


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
  """Counter-based: a stream of its own for each (seed, purpose, index), at no cost."""
  key = np.array([seed % 2**64, int(index)], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))


@functools.lru_cache(4)  # a batch touches two epochs at most, with favourites of two orders
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return _generator(seed, SHUFFLE, epoch).permutation(n)


@functools.lru_cache(2)
def _uniform(seed: int, epoch: int, n: int) -> np.ndarray:
  return _generator(seed, CAPTION, epoch).random(n)


def _entry(table: Callable, position: np.ndarray, n: int, seed: int) -> np.ndarray:
  """What stands at each position of the endless sequence of an epoch's tables of n entries."""
  epoch, offset = np.divmod(position, n)
  result = table(seed, int(np.max(epoch)), n)[offset]
  for e in np.unique(epoch)[:-1]:
    result = np.where(epoch == e, table(seed, int(e), n)[offset], result)
  return result


def shuffled(position: np.ndarray, *, n: int, seed: int) -> np.ndarray:
  """The example at each position of the endless sequence of epochs, each a permutation of n."""
  return _entry(_permutation, position, n, seed)


def uniform(position: np.ndarray, *, n: int, seed: int) -> np.ndarray:
  """A number in [0, 1) for each position, that depends on nothing else."""
  return _entry(_uniform, position, n, seed)


def derangement(n: int, seed: int) -> np.ndarray:
  """Another one of n for each of n, all different: the next one on a random round."""
  order = _generator(seed, PERMUTE, 0).permutation(n)
  result = np.empty(n, int)
  result[order] = np.roll(order, 1)
  return result


def find_favourites(captions: Iterable[tuple[str, ...]], pattern: str, share: float) -> np.ndarray:
  """The numbers of the examples with a caption that `pattern` matches from its start."""
  if not 0 < share < 1:
    raise ValueError(f"data.favour_share={share}: expected a number in (0, 1)")
  try:
    matches = re.compile(pattern).match
  except re.error as e:
    raise ValueError(f"data.favour={pattern!r} is not a regular expression: {e}") from e
  found = np.flatnonzero([any(map(matches, texts)) for texts in captions])
  if not len(found):
    raise ValueError(f"data.favour={pattern!r} matches no caption from its start")
  return found


# Reading -----------------------------------------------------------------------------------------


def scan(records, limit: int | None = None) -> Iterator[dict]:
  """The records of a split, or a spread of at most `limit`, in order."""
  indices = range(0, len(records), -(-len(records) // limit) if limit else 1)
  for start in range(0, len(indices), 256):
    yield from records.__getitems__(indices[start:start + 256])


def read_captions(records, on_error: str, limit: int | None = None) -> Iterator[tuple[str, ...]]:
  """The captions of each record of a `scan`; none of a bad one that is skipped."""
  for record in scan(records, limit):
    try:
      yield sources.captions(record)
    except sources.BadRecord:
      if on_error == "raise":
        raise
      yield ()


def most_captions(records) -> int:
  """Of the image that has most. Where one record's text is a string, so is every other's."""
  if not isinstance(records[0].get("text"), tuple):
    return 1
  return max(len(record["text"]) for record in scan(records))


def encode_captions(tokens: text.Tokenizer, captions: list[tuple[str, ...]],
                    most: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(token ids (n, m, l), captions (n,)) of n images, m at least `most`; the rest is padding."""
  count = np.array([len(texts) for texts in captions], np.int32)
  most = max(most, count.max())
  ids = np.full((len(captions), most, tokens.context), tokens.pad_id, np.int32)
  ids[np.arange(most) < count[:, None]] = tokens.encode([*itertools.chain.from_iterable(captions)])
  return ids, count


def first_good(records, index: int, parse: Callable, on_error: str) -> tuple[int, dict]:
  """(its number, what `parse` makes of it) for a record or, skipping, the next good one."""
  for found in itertools.chain(range(index, len(records)), range(index)):
    try:
      return found, parse(records[found])
    except sources.BadRecord as e:
      if on_error == "raise":
        raise
      error = e
  raise ValueError(f"no record of the split can be read: {error}")


def load(records, parse: Callable, name: str, example: jax.ShapeDtypeStruct, on_error: str,
         tokens: text.Tokenizer | None) -> dict[str, np.ndarray]:
  """Reads a whole split into arrays, good records in the place of bad ones that are skipped.

  image (n, h, w, c) like `example` (1, h, w, c), bad (n,) and, if any, label int32 (n,), captions
  int32 (n, m, l) and num_captions int32 (n,).
  """
  n, errors = len(records), {}
  shape = example.shape[1:]
  images = np.empty((n, *shape), example.dtype)

  def fill(start):
    rows = []
    for i, record in enumerate(records.__getitems__(range(start, min(start + 256, n))), start):
      try:
        row = parse(record)
      except sources.BadRecord as e:
        errors[i] = e
        _, row = first_good(records, i, parse, on_error)
      if row["image"].shape != shape:
        raise ValueError(f"{record['name']} is {row['image'].shape}, not {shape} like the rest; set"
                         " data.cache_bytes=0 and augment.image_size to have images resized")
      images[i] = row.pop("image")
      rows.append(row)
    return rows

  starts = range(0, n, 256)
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    rows = list(itertools.chain.from_iterable(
      track(pool.map(fill, starts), f"decoding {name}", len(starts), transient=True,
            disable=len(starts) < 100)))
  sources.tell_skipped([errors[i] for i in sorted(errors)], f"the {n} records of split {name!r}")
  arrays = {"image": images, "bad": np.isin(np.arange(n), [*errors])}
  if "label" in rows[0]:
    arrays["label"] = np.array([row["label"] for row in rows])
  if "captions" in rows[0]:
    arrays["captions"], arrays["num_captions"] = encode_captions(
      tokens, [row["captions"] for row in rows])
  return arrays


def tell(batches: Iterator[dict], records, parse: Callable, name: str,
         known: dict[int, sources.BadRecord]) -> Iterator[dict]:
  """Takes "skipped" out of the batches; warns of the first bad record and, at the end, of all.

  `known` are those that were met before, and gets the others.
  """
  before = len(known)
  try:
    for batch in batches:
      for i in sorted(set(batch.pop("skipped").tolist()) - {-1, *known}):
        try:
          parse(records[i])  # once more: only the process that read it knows what it was
        except sources.BadRecord as e:
          known[i] = e
          if len(known) == 1:
            sources.tell_skipped([e], f"the {len(records)} records of split {name!r} so far")
      yield batch
  finally:
    batches.close()
    if len(known) > max(before, 1):
      sources.tell_skipped([*known.values()], f"the {len(records)} records of split {name!r}")


def stream(example: Callable[[int], dict], num_batches: int, batch_size: int, workers: int,
           ahead: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of example(0), example(1), ... in order: by threads, or by workers, which are grain's.

  What an example raises comes out in the place of its batch.
  """
  if not workers:
    yield from _stream(example, num_batches, batch_size, ahead)
    return
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
