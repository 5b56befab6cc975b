"""From a source to host batches: what `config.data` says, checked.

Batch n of a run holds the positions n*B .. (n+1)*B - 1 of an endless sequence of epochs, so it
follows from (seed, n) alone: not from where reading began, nor from how many processes or workers
share it. Small data is decoded once and gathered from memory; the rest is decoded as it is read.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from input_pipeline import decode, geometry, order, reading
from input_pipeline.records import (
  VIEWS,
  Feature,
  Info,
  at_size,
  is_moved,
  listed,
  native_size,
  nearest,
)
from input_pipeline.sources import open_source


class Data(NamedTuple):
  """The batches of a source; each is a dict of NumPy arrays, one a feature: (b, *its shape).

  Image uint8 (b, h, w, c), label int32 (b,). With a tokenizer also text, int32 (b, l): in training
  one of the image's captions, drawn anew each time; in evaluation the first, and besides captions
  (b, m, l), of which the first num_captions (b,) are the image's and the rest padding. Of latents,
  image is float32 as `latents.read_latent` gives it. A second view of a feature is NAME_2.

  `rows`, a slice or an index array, are the rows of the global batch that this process holds.
  """
  info: Info
  train: Callable  # (start, stop, rows=None) -> iterator over the batches start .. stop - 1
  eval: Callable  # (split=None, batch_size, rows=None, limit=None) -> iterator, each example once,
  #                 in order, or `limit` of them, spread over the split; "valid" (b,) is False on
  #                 bad records and on rows that fill up the last batch
  spec: dict[str, jax.ShapeDtypeStruct]  # of the global training batch
  train_split: str
  eval_split: str | None
  tokenizer: Any  # text.Tokenizer, or None
  carrying: Callable  # (names of features) -> the same with no others, which are not even decoded


class Options(NamedTuple):
  """How a source is read; fields of `config.data`."""
  train_split: str = "train"  # a split, or a part of one such as "train[:99%]"
  eval_split: str | None = None  # what evaluation reads if it is asked for no split; None = test,
  #                                val or validation
  cache_bytes: int = 2**30  # for the decoded images of one split; 0 = always stream
  batch_at_most: bool = False  # whether fewer training examples than batch_size lower it, to a
  # power of two
  workers: int = 0  # processes that decode when streaming; 0 = threads of this process
  prefetch_batches: int = 2  # batches (when streaming: of each worker) made ahead
  repeats: int = 1  # times that an example is drawn in a row, augmented anew (1901.09335)
  on_error: Literal["raise", "skip"] = "raise"  # on a record that cannot be used. With "skip", and
  # a warning, in training the next good one of the split stands in for it, in evaluation it is not
  # valid; bad rows of a metadata file are left out altogether
  latents: Literal["mean", "mean_std", "moments"] | None = None  # where an autoencoder's arrays
  # stand in the place of images, what they hold, see `latents.read_latent`
  tokenizer: str | None = None  # "bytes", "bpe", which is trained on the captions of `train_split`
  # (a spread of 100,000 examples if there are more), or PATH.json; None = no text
  context: int = 64  # tokens of a text, see `text.make`
  vocab_size: int = 1024  # of a tokenizer that is trained here
  lower_case: bool = False  # whether texts lose their capitals first
  eos_id: int | None = None  # of the token that ends a text; None = the tokenizer's
  pad_id: int | None = None  # of the token that fills a text up; None = the tokenizer's
  mask_token: bool = False  # whether the vocabulary has a token that hides others
  permute_text: bool = False  # whether each training image has the captions of another, always the
  # same one, so that nothing can be learnt: for control
  favour: str | None = None  # regular expression of captions, from their start: the examples that
  # have one are `favour_share` of the training examples, in an order of their own
  favour_share: float = 0.5  # of the training examples, (0, 1)
  held_out: float | None = None  # share that is the split "test" of the lines of a file of texts,
  # (0, 1), None = 0.05; or of the images of a folder that has one split alone, [0, 1), None = 0;
  # train.py writes 0.1 into new runs that say neither this nor eval_split
  follow_links: bool = False  # whether links in a folder may lead out of it


def make(source: str, *, batch_size: int, data_dir: str | None = None, seed: int = 0,
         views: Sequence[geometry.View] = (geometry.View(),), **options: Options) -> Data:
  """The batches of all that a source has: `open_data`, which says what these are, and all of it."""
  return open_data(source, batch_size=batch_size, data_dir=data_dir, seed=seed, views=views,
                   **options).carrying()


def open_data(source: str, *, batch_size: int, data_dir: str | None = None, seed: int = 0,
              views: Sequence[geometry.View] = (geometry.View(),), **options: Options):
  """Opens a source to make batches of it.

  A split whose decoded images are all of one size and fit in `cache_bytes` is held in memory at
  that size; any other is streamed. Both are cropped and resized here, to the same pixels.

  Args:
    source: where examples come from, see `sources.open_source`.
    data_dir: see there.
    batch_size: of the global training batch, at most the number of training examples.
    seed: of the order, the crops and the choice of captions.
    views: how images are cut; a second one gives training batches "image_2". A size of None is
      that of the images, if all have one. Latents are neither cropped nor resized.
    **options: the fields of `Options`.

  Returns a `Reader`, whose `carrying` gives `Data`.

  Raises:
    ValueError, FileNotFoundError: a field of the configuration or a record that does not do.
  """
  options = Options(**options)
  for field, value, least in (("batch_size", batch_size, 1), ("workers", options.workers, 0),
                              ("repeats", options.repeats, 1),
                              ("prefetch_batches", options.prefetch_batches, 1)):
    check_least(f"data.{field}", value, least)
  splits, info = open_source(source, data_dir, options.on_error, options.latents, options.held_out,
                             options.follow_links)
  if "[" in f"{options.train_split}{options.eval_split}":
    from input_pipeline.splits import with_parts
    splits = with_parts(splits, (options.train_split, options.eval_split))
  info = info._replace(num_examples={name: len(records) for name, records in splits.items()})
  if options.eval_split is None:
    found = next((s for s in ("test", "val", "validation") if s in splits), None)
    options = options._replace(eval_split=found)
  check_split("data.train_split", options.train_split, splits)
  if options.eval_split is not None:
    check_split("data.eval_split", options.eval_split, splits)
  records = splits[options.train_split]
  if batch_size > len(records) and options.batch_at_most:
    batch_size = 2 ** (len(records).bit_length() - 1)
  if batch_size > len(records):
    raise ValueError(f"data.batch_size={batch_size} is larger than the {len(records)} examples of "
                     f"split {options.train_split!r}")
  for field in ("tokenizer", "favour"):
    value = getattr(options, field)
    if value is not None and "text" not in info.features:
      raise ValueError(f"data.{field}={value!r} needs captions, but split {options.train_split!r} "
                       f"of {source!r} has {' and '.join(sorted(info.features))} only")
  return Reader(source, splits, info, views, seed, batch_size, options)


class Reader:
  """Batches of any split, from memory or as they are read."""

  def __init__(self, source: str, splits, info: Info, views, seed: int, batch_size: int,
               options: Options):
    self.source, self.splits, self.info, self.seed = source, splits, info, seed
    self.views, self.batch_size, self.options = views, batch_size, options
    self.train_split, self.eval_split = options.train_split, options.eval_split
    records, n = splits[options.train_split], info.num_examples[options.train_split]
    self.tokenizer = favourites = None
    if options.tokenizer is not None or options.favour is not None:
      from input_pipeline import captions
      self.tokenizer = captions.make_tokenizer(records, options)
      favourites = captions.find_favourites(records, options)
    self.pick = functools.partial(order.pick, n=n, seed=seed, repeats=options.repeats,
                                  favourites=favourites, share=options.favour_share)
    self.other = captions.derangement(n, seed) if (
      self.tokenizer and options.permute_text) else None
    self.arrays = {}  # split -> what is held in memory
    self.skipped = {split: {} for split in splits}  # number -> error, of what was streamed so far

  def typical_size(self) -> tuple[int, int]:
    """The images' (height, width), or squares of the median shorter side where these differ."""
    shape = self.info.image_shape[:2]
    if None not in shape:
      return shape
    from input_pipeline import viewing
    return (viewing.typical_side(self.splits[self.train_split]),) * 2

  def carrying(self, names: Iterable[str] | None = None) -> Data:
    """`Data` of these features alone; None: of all. Raises ValueError where sizes must be said."""
    reader, kept = copy.copy(self), self.info.features if names is None else set(names)
    reader.arrays = {}
    carried = {name: x for name, x in self.info.features.items() if name in kept}
    reader.texts = self.tokenizer is not None and any(x.kind == "text" for x in carried.values())
    reader.features = {name: x for name, x in carried.items() if x.kind not in ("text", "latent")}
    has_latent = any(x.kind == "latent" for x in carried.values())
    reader.latents = self.options.latents if has_latent else None
    reader.moved = any(map(is_moved, reader.features.values()))
    reader.native = native_size(carried)
    reader.views = geometry.at_native_size(self.views, carried, self.source)
    # Said once, and not for every example.
    reader.cut = {is_train: reader.moves(is_train) for is_train in (True, False)}
    reader.centre = geometry.Look(functools.partial(geometry.for_evaluation, reader.views[0]),
                                  reader.views[0].interpolation)
    views = reader.views if reader.cut[True] else reader.views[:1]
    spec = make_spec(carried, self.batch_size, [view.image_size for view in views],
                     self.tokenizer, self.options.latents)
    return Data(self.info, reader.train, reader.eval, spec,
                self.train_split, self.eval_split, self.tokenizer, self.carrying)

  def __getstate__(self):
    return {**self.__dict__, "arrays": {}}  # workers stream: they need nothing that is in memory

  def train(self, start: int, stop: int, rows=None) -> Iterator[dict[str, np.ndarray]]:
    return self.read(self.train_split, range(start, stop), self.batch_size, rows, self.pick,
                     is_train=True)

  def eval(self, split: str | None = None, batch_size: int | None = None, rows=None,
           limit: int | None = None):
    split = self.eval_split if split is None else split
    if split is None:
      raise ValueError(f"{self.source!r} has no split test or val to evaluate on, but "
                       f"{' and '.join(self.splits)}: data.eval_split={self.train_split} evaluates "
                       "on that, data.held_out=0.1, in a new run, on a part that is kept for it")
    batch_size = self.batch_size if batch_size is None else batch_size
    check_split("split", split, self.splits)
    check_least("batch_size", batch_size, 1)
    count = self.info.num_examples[split]
    if limit is None or limit >= count:
      return self.read(split, range(-(-count // batch_size)), batch_size, rows,
                       lambda position: np.where(position < count, position, 0), is_train=False)
    check_least("limit", limit, 1)
    chosen = order.spread(count, limit)
    rows = np.arange(batch_size)[slice(None) if rows is None else rows]
    batches = self.read(split, range(-(-limit // batch_size)), batch_size, rows,
                        lambda position: chosen[np.minimum(position, limit - 1)], is_train=False)
    return ({**batch, "valid": batch["valid"] & (number * batch_size + rows < limit)}
            for number, batch in enumerate(batches))

  def moves(self, is_train: bool) -> bool:
    """Whether anything but whole images, as large as they are, may be seen."""
    views = self.views if is_train else self.views[:1]
    return self.moved and (self.native is None or any(
      geometry.moves(view, *self.native, is_train) for view in views))

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
    """A record as arrays: what is seen of it, or all; its captions. Raises BadRecord."""
    if looks:
      from input_pipeline import viewing
      result = viewing.read(record, self.features, looks, coarse)
    else:
      result = decode.read(record, self.features)
    if self.latents:
      from input_pipeline.latents import read_latent
      result["image"] = read_latent(record, self.latents)
    if self.texts and "text" in record:
      from input_pipeline.captions import captions_of
      result["captions"] = captions_of(record)
    return result

  def cached(self, split: str, numbers: range) -> dict[str, np.ndarray] | None:
    """A split's arrays, if it is one that is held in memory; read when a batch is asked for."""
    if self.moved and self.native is None:
      return None
    example = make_spec(self.info.features, 1, [self.native], None, self.latents)
    example = {name: x for name, x in example.items()
               if name in self.features or name == "image" and self.latents}
    size = sum(x.size * x.dtype.itemsize for x in example.values())
    if self.info.num_examples[split] * size > self.options.cache_bytes:
      return None
    if numbers and split not in self.arrays:
      self.arrays[split] = reading.load(self.splits[split], self.parse, split, example,
                                        self.options.on_error, self.tokenizer)
    return self.arrays.get(split, {})

  def finish(self, arrays, position, split: str, is_train: bool) -> dict[str, np.ndarray]:
    """The arrays of the batch, or of the example, at `position`, as `Data` promises them."""
    bad = arrays.pop("bad")
    if not is_train:
      arrays["valid"] = (position < self.info.num_examples[split]) & ~bad
    if "captions" in arrays:
      from input_pipeline.captions import choose
      choose(arrays, position, self.info.num_examples[split], self.seed, is_train)
    return arrays

  def read(self, split: str, numbers: range, batch_size: int, rows, index_of: Callable,
           is_train: bool) -> Iterator[dict[str, np.ndarray]]:
    """The batches `numbers` of a split whose example at a position is `index_of` it."""
    rows = np.arange(batch_size)[slice(None) if rows is None else rows]
    arrays = self.cached(split, numbers)
    if arrays is None:
      from input_pipeline import streaming
      return streaming.read(self, split, numbers, batch_size, rows, index_of, is_train)

    def gather(number):
      position = number * batch_size + rows
      index = index_of(position)
      text_of = self.other[index] if is_train and self.other is not None else index
      batch = {key: np.take(a, text_of if "captions" in key else index, axis=0)
               for key, a in arrays.items()}
      if self.cut[is_train] and len(position):
        from input_pipeline.viewing import see_all
        batch = see_all(batch, self.features, [self.looks(at, is_train) for at in position])
      return self.finish(batch, position, split, is_train)
    return reading.prefetch(map(gather, numbers), self.options.prefetch_batches)


def make_spec(features: Mapping[str, Feature], batch_size: int, sizes: Sequence, tokens: Any = None,
              latents: str | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a global training batch; `sizes` are those of its views."""
  spec = {}
  for view, size in zip(VIEWS, sizes):
    for name, feature in features.items():
      shape = at_size(feature, size)
      if feature.kind == "latent" and latents != "mean":
        shape = (*shape[:2], 2 * shape[2])
      if feature.kind == "text" and tokens:
        spec[name] = jax.ShapeDtypeStruct((batch_size, tokens.context), np.int32)
      elif feature.kind != "text" and (not view or is_moved(feature)):
        spec[name + view] = jax.ShapeDtypeStruct((batch_size, *shape), np.dtype(feature.dtype))
  return spec


def check_split(field: str, split: str, splits) -> None:
  if split not in splits:
    raise ValueError(f"{field}={split!r} is not a split; {nearest(split, splits, listed(splits))}")


def check_least(field: str, value: int, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{field}={value!r}; it must be a whole number >= {least}")


def read_tokenizer(said: str):
  """The `text.Tokenizer` of a run directory's file."""
  from input_pipeline import text
  return text.from_json(said)
