"""From a source to host batches: what `config.data` says, checked.

Batch n of a run holds the positions n*B .. (n+1)*B - 1 of an endless sequence of epochs, so it
follows from (seed, n) alone: not from where reading began, nor from how many processes or workers
share it. Small data is decoded once and gathered from memory; the rest is decoded as it is read.
"""

from collections.abc import Sequence

from input_pipeline import geometry
from input_pipeline.reader import Data, Options, Reader, check_least, check_split
from input_pipeline.sources import open_source


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


def read_tokenizer(said: str):
  """The `text.Tokenizer` of a run directory's file."""
  from input_pipeline import text
  return text.from_json(said)
