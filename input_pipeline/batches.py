"""From records to host batches: which examples make batch n, and two ways to read them.

Batch n of a run holds the positions n*B .. (n+1)*B - 1 of an endless sequence of epochs, so it
follows from (seed, n) alone: not from where reading began, nor from how many processes or workers
share it. Small data is decoded once and gathered from memory; the rest is decoded as it is read.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from input_pipeline import geometry, order, reading
from input_pipeline.captions import encode_captions, most_captions, read_captions
from input_pipeline.decode import decode, decode_looks
from input_pipeline.records import Info, captions, nearest
from input_pipeline.sources import open_source
from input_pipeline.splits import with_parts

IMAGES = ("image", "image_2")  # of a batch, by view


class Data(NamedTuple):
  """The batches of a source; each is a dict of NumPy arrays: image uint8 (b, h, w, c), label (b,).

  With a tokenizer also text, int32 (b, l): in training one of the image's captions, drawn anew
  each time; in evaluation the first, and besides captions (b, m, l), of which the first
  num_captions (b,) are the image's and the rest padding. Of latents, image is float32 as
  `latents.read_latent` gives it.

  `rows`, a slice or an index array, are the rows of the global batch that this process holds.
  """
  info: Info
  train: Callable  # (start, stop, rows=None) -> iterator over the batches start .. stop - 1
  eval: Callable  # (split=None, batch_size, rows=None) -> iterator, each example once, in order;
  #                 "valid" (b,) is False on bad records and on rows that fill up the last batch
  spec: dict[str, jax.ShapeDtypeStruct]  # of the global training batch
  train_split: str
  eval_split: str | None
  tokenizer: Any  # text.Tokenizer, or None


def make(source: str, *, batch_size: int, data_dir: str | None = None, seed: int = 0,
         views: Sequence[geometry.View] = (geometry.View(),), train_split: str = "train",
         eval_split: str | None = None, cache_bytes: int = 2**30, workers: int = 0,
         prefetch_batches: int = 2, repeats: int = 1,
         on_error: Literal["raise", "skip"] = "raise",
         latents: Literal["mean", "mean_std", "moments"] | None = None,
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
      "mean_std" or "moments", see `latents.read_latent`.
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
  fields = {"data.batch_size": (batch_size, 1), "data.workers": (workers, 0),
            "data.repeats": (repeats, 1), "data.prefetch_batches": (prefetch_batches, 1)}
  for field, (value, least) in fields.items():
    _check_least(field, value, least)
  splits, info = open_source(source, data_dir, on_error, latents, held_out)
  splits = with_parts(splits, (train_split, eval_split))
  info = info._replace(num_examples={name: len(records) for name, records in splits.items()})
  if eval_split is None:
    eval_split = next((s for s in ("test", "val", "validation") if s in splits), None)
  _check_split("data.train_split", train_split, splits)
  if eval_split is not None:
    _check_split("data.eval_split", eval_split, splits)
  n, records = info.num_examples[train_split], splits[train_split]
  if batch_size > n:
    raise ValueError(f"data.batch_size={batch_size} is larger than the {n} examples of split "
                     f"{train_split!r}")
  views = _at_size(views, info, latents, source)
  _check_texts(records[0], train_split, source, tokenizer=tokenizer, favour=favour)
  tokens = None
  if tokenizer is not None:
    from input_pipeline import text  # a run on images alone is spared the library
    tokens = text.make(
      tokenizer, itertools.chain.from_iterable(read_captions(records, on_error, 100_000)),
      context=context, vocab_size=vocab_size, lower_case=lower_case, eos_id=eos_id, pad_id=pad_id,
      mask_token=mask_token)
  favourites = None if favour is None else order.find_favourites(
    read_captions(records, on_error), favour, favour_share)
  other = order.derangement(n, seed) if tokens and permute_text else None
  reader = Reader(splits, info, views, seed, cache_bytes, workers, prefetch_batches, on_error,
                  latents, tokens, other)
  pick = functools.partial(order.pick, n=n, seed=seed, repeats=repeats, favourites=favourites,
                           share=favour_share)

  def train(start: int, stop: int, rows=None) -> Iterator[dict[str, np.ndarray]]:
    return reader.read(train_split, range(start, stop), batch_size, rows, pick, is_train=True)

  def evaluate(split: str | None = None, batch_size: int = batch_size, rows=None):
    split = eval_split if split is None else split
    _check_split("split", split, splits)
    _check_least("batch_size", batch_size, 1)
    count = info.num_examples[split]
    return reader.read(split, range(-(-count // batch_size)), batch_size, rows,
                       lambda position: np.where(position < count, position, 0), is_train=False)

  spec = make_spec(batch_size, views[0].image_size, info.image_shape[2], info.num_classes, tokens,
                   len(views) if reader.cut[True] else 1, latents)
  return Data(info, train, evaluate, spec, train_split, eval_split, tokens)


class Reader:
  """Batches of any split, from memory or as they are read: what `make` was told, put to use."""

  def __init__(self, splits, info: Info, views, seed: int, cache_bytes: int, workers: int,
               prefetch_batches: int, on_error: str, latents: str | None, tokens, other):
    self.splits, self.info, self.views, self.seed = splits, info, views, seed
    self.cache_bytes, self.workers, self.ahead = cache_bytes, workers, prefetch_batches
    self.on_error, self.latents, self.tokens = on_error, latents, tokens
    self.other = other  # of each training image, the one that it has the captions of; or None
    height, width, self.channels = info.image_shape
    self.native = None if height is None or width is None else (height, width)
    self.arrays = {}  # split -> what is held in memory
    self.skipped = {split: {} for split in splits}  # number -> error, of what was streamed so far
    self.cut = {is_train: self.moves(is_train) for is_train in (True, False)}  # not once an example
    self.centre = geometry.Look(functools.partial(geometry.for_evaluation, views[0]),
                                views[0].interpolation)

  def __getstate__(self):
    return {**self.__dict__, "arrays": {}}  # workers stream: they need nothing that is in memory

  def moves(self, is_train: bool) -> bool:
    """Whether anything but whole images, as large as they are, may be seen."""
    views = self.views if is_train else self.views[:1]
    return self.native is None or any(
      geometry.moves(view, *self.native, is_train) for view in views)

  def looks(self, position: int, is_train: bool) -> list[geometry.Look]:
    """What is seen of the image at a position; [] where it is the whole."""
    if not self.cut[is_train]:
      return []
    if not is_train:
      return [self.centre]
    return [geometry.Look(functools.partial(
      geometry.for_training, view, order.generator(self.seed, purpose, position)),
      view.interpolation, exact=False)
      for view, purpose in zip(self.views, (order.CROP, order.CROP_2))]

  def parse(self, record, looks=(), coarse: bool = False) -> dict[str, np.ndarray]:
    """A record as arrays: what is seen of it, or all; its label, captions. Raises BadRecord."""
    if self.latents:
      from input_pipeline.latents import read_latent
      result = {"image": read_latent(record, self.latents)}
    elif looks and record["image"] is None:
      black = decode(record, self.channels)
      result = dict(zip(IMAGES, [geometry.see_array(black, look) for look in looks]))
    elif looks:
      result = dict(zip(IMAGES, decode_looks(record, self.channels, looks, coarse)))
    else:
      result = {"image": decode(record, self.channels)}
    if "label" in record:
      result["label"] = np.int32(record["label"])
    if self.tokens and "text" in record:
      result["captions"] = captions(record)
    return result

  def cached(self, split: str, numbers: range) -> dict[str, np.ndarray] | None:
    """A split's arrays, if it is one that is held in memory; read when a batch is asked for."""
    if self.native is None:
      return None
    example = make_spec(1, self.native, self.channels, latents=self.latents)["image"]
    if self.info.num_examples[split] * example.size * example.dtype.itemsize > self.cache_bytes:
      return None
    if numbers and split not in self.arrays:
      self.arrays[split] = reading.load(self.splits[split], self.parse, split, example,
                                        self.on_error, self.tokens)
    return self.arrays.get(split, {})

  def finish(self, arrays, position, split: str, is_train: bool) -> dict[str, np.ndarray]:
    """The arrays of the batch, or of the example, at `position`, as `Data` promises them."""
    bad = arrays.pop("bad")
    if not is_train:
      arrays["valid"] = (position < self.info.num_examples[split]) & ~bad
    if "captions" in arrays:
      found, count = arrays["captions"], arrays["num_captions"]
      drawn = 0 * count if not is_train else (order.uniform(
        position, n=self.info.num_examples[split], seed=self.seed) * count).astype(int)
      arrays["text"] = np.take_along_axis(found, drawn[..., None, None], -2)[..., 0, :]  # b l
      if is_train:
        del arrays["captions"], arrays["num_captions"]
    return arrays

  def read(self, split: str, numbers: range, batch_size: int, rows, index_of: Callable,
           is_train: bool) -> Iterator[dict[str, np.ndarray]]:
    """The batches `numbers` of a split whose example at a position is `index_of` it."""
    rows = np.arange(batch_size)[slice(None) if rows is None else rows]
    arrays = self.cached(split, numbers)
    if arrays is None:
      return self.streamed(split, numbers, batch_size, rows, index_of, is_train)

    def gather(number):
      position = number * batch_size + rows
      index = index_of(position)
      text_of = self.other[index] if is_train and self.other is not None else index
      batch = {key: np.take(a, text_of if "captions" in key else index, axis=0)
               for key, a in arrays.items()}
      batch = see_all(batch, [self.looks(at, is_train) for at in position])
      return self.finish(batch, position, split, is_train)
    return reading.prefetch(map(gather, numbers), self.ahead)

  def streamed(self, split, numbers, batch_size, rows, index_of, is_train):
    """`read` of a split that is decoded as it is read."""
    records = self.splits[split]
    most = most_captions(records) if self.tokens and numbers and not is_train else 0
    permuted = is_train and self.other is not None

    def example(i):
      number, row = divmod(i, len(rows))
      position = (numbers.start + number) * batch_size + rows[row]
      index = int(index_of(position))
      found, arrays = reading.first_good(records, index, functools.partial(
        self.parse, looks=self.looks(position, is_train),
        coarse=is_train and self.native is None), self.on_error)
      if permuted:
        _, told = reading.first_good(records, int(self.other[index]), self.parse, self.on_error)
        arrays["captions"] = told["captions"]
      if "captions" in arrays:
        ids, count = encode_captions(self.tokens, [arrays["captions"]], most)
        arrays |= {"captions": ids[0], "num_captions": count[0]}
      arrays["bad"] = np.bool(found != index)
      told = {} if self.on_error == "raise" else {
        "skipped": np.int32(index if arrays["bad"] else -1)}
      return self.finish(arrays, position, split, is_train) | told
    made = reading.stream(example, len(numbers), len(rows), self.workers, self.ahead)
    if self.on_error == "raise":
      return made
    return reading.tell(made, records, self.parse, split, self.skipped[split])


def _at_size(views: Sequence[geometry.View], info: Info, latents, source) -> list[geometry.View]:
  """The views, with the images' own size where they say none. Raises ValueError."""
  height, width, _ = info.image_shape
  native = None if height is None or width is None else (height, width)
  if native is None and any(view.image_size is None for view in views):
    raise ValueError("augment.image_size=None, but the images are of several sizes: set it")
  views = [view._replace(image_size=view.image_size or native) for view in views]
  if latents and (len(views) > 1 or any(
      geometry.moves(views[0], *native, is_train) for is_train in (True, False))):
    raise ValueError(f"augment: the latents of {source!r} are {native[0]}x{native[1]} and are not "
                     "cropped or resized: set no other image_size, no crop_area, no second_view")
  return views


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


def read_tokenizer(said: str):
  """The `text.Tokenizer` of a run directory's file."""
  from input_pipeline import text
  return text.from_json(said)


def make_spec(batch_size: int, size: tuple[int, int], channels: int, num_classes: int = 0,
              tokens: Any = None, views: int = 1,
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


def _check_texts(record, split: str, source: str, **fields) -> None:
  for field, value in fields.items():
    if value is not None and "text" not in record:
      has = sorted(record.keys() - {"name"})
      raise ValueError(f"data.{field}={value!r} needs captions, but split {split!r} of "
                       f"{source!r} has {' and '.join(has)} only")


def _check_split(field: str, split: str, splits) -> None:
  if split not in splits:
    raise ValueError(f"{field}={split!r} is not a split; {nearest(str(split), (*splits,))}")


def _check_least(field: str, value: int, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{field}={value!r}; it must be a whole number >= {least}")
