"""From records to host batches: which examples make batch n, and two ways to read them.

Batch n of a run holds the positions n*B .. (n+1)*B - 1 of an endless sequence of epochs, so it
follows from (seed, n) alone: not from where reading began, nor from how many processes or workers
share it. Small data is decoded once and gathered from memory; the rest streams through grain.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from rich.progress import track

from input_pipeline import sources

SHUFFLE, CROP = range(2)  # the purposes of randomness


class Data(NamedTuple):
  """The batches of a source; each is a dict of NumPy arrays: image uint8 (b, h, w, c), label (b,).

  `rows`, a slice or an index array, are the rows of the global batch that this process holds.
  """
  info: sources.Info
  train: Callable  # (start, stop, rows=None) -> iterator over the batches start .. stop - 1
  eval: Callable  # (split=None, batch_size, rows=None) -> iterator, each example once, in order;
  #                 "valid" (b,) is False on the rows that fill up the last batch
  cropped: bool  # training images come cropped and resized to image_size, else at their own size
  spec: dict[str, jax.ShapeDtypeStruct]  # of the global training batch
  train_split: str
  eval_split: str | None


def make(source: str, *, batch_size: int, data_dir: str | None = None, seed: int = 0,
         image_size: int | tuple[int, int] | None = None, train_split: str = "train",
         eval_split: str | None = None, cache_bytes: int = 2**30, workers: int = 0,
         prefetch_batches: int = 2, repeats: int = 1,
         crop_area: tuple[float, float] | None = None,
         crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Data:
  """Makes the batches of a source.

  A split whose decoded images are all of one size and fit in `cache_bytes` is held in memory, its
  images at their own size: the device crops and resizes. Any other is streamed, its images cropped
  and resized to `image_size` here: at random in training if `crop_area` is set, else at the centre.

  Args:
    source, data_dir: see `sources.open_source`.
    batch_size: of the global training batch, at most the number of training examples.
    seed: of the order and the crops.
    image_size: side or (h, w) in pixels; may be None if all images have one size.
    eval_split: what `eval` reads if it is asked for no split; None = test, val or validation.
    cache_bytes: for the decoded images of one split; 0 = always stream.
    workers: processes that decode when streaming; 0 = threads of this process.
    repeats: times that an example is drawn in a row, augmented anew (1901.09335).
    prefetch_batches: batches (when streaming: of each worker) made ahead.
    crop_area, crop_ratio: see `random_box`.

  Raises:
    ValueError, FileNotFoundError: a field of the configuration or a record that does not do.
  """
  splits, info = sources.open_source(source, data_dir)
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
  size = (image_size, image_size) if isinstance(image_size, int) else image_size or native
  if size is None:
    raise ValueError("augment.image_size=None, but the images are of several sizes: set it")
  size = tuple(size)
  # The margin that centre crops leave is the counterpart of random crops, which enlarge things.
  margin = 256 / 224 if crop_area else 1.0

  def is_cached(split: str) -> bool:
    return native is not None and info.num_examples[split] * math.prod(
      info.image_shape) <= cache_bytes

  @functools.cache
  def cache(split: str) -> dict[str, np.ndarray]:
    return load(splits[split], split, info.image_shape)

  def read(split, numbers, batch_size, rows, index_of, box_of, mark):
    rows = np.arange(batch_size)[slice(None) if rows is None else rows]

    def finish(batch, position):
      return batch | {"valid": position < info.num_examples[split]} if mark else batch

    if is_cached(split):
      arrays = cache(split)

      def gather(number):
        position = number * batch_size + rows
        index = index_of(position)
        return finish({key: np.take(a, index, axis=0) for key, a in arrays.items()}, position)
      return prefetch(map(gather, numbers), prefetch_batches)

    records = splits[split]

    def example(i):
      number, row = divmod(i, len(rows))
      position = (numbers.start + number) * batch_size + rows[row]
      record = records[int(index_of(position))]
      image = sources.decode(record, channels, None if (box := box_of(position)) is None else size,
                             box)
      label = {"label": np.int32(record["label"])} if "label" in record else {}
      return finish({"image": image} | label, position)
    return stream(example, len(numbers), len(rows), workers, prefetch_batches)

  def train(start: int, stop: int, rows=None) -> Iterator[dict[str, np.ndarray]]:
    def box_of(position):
      if crop_area:
        return functools.partial(random_box, _generator(seed, CROP, position), crop_area,
                                 crop_ratio)
      return centre
    return read(train_split, range(start, stop), batch_size, rows,
                lambda position: shuffled(position // repeats, n=n, seed=seed), box_of, False)

  centre = None if native == size else functools.partial(centre_box, size, margin)

  def evaluate(split: str | None = None, batch_size: int = batch_size, rows=None):
    split = eval_split if split is None else split
    _check_split("split", split, splits)
    _check_least("batch_size", batch_size, 1)
    count = info.num_examples[split]
    return read(split, range(-(-count // batch_size)), batch_size, rows,
                lambda position: np.where(position < count, position, 0), lambda _: centre, True)

  cropped = not is_cached(train_split)
  spec = {"image": jax.ShapeDtypeStruct((batch_size, *(size if cropped else native), channels),
                                        np.uint8)}
  if info.num_classes:
    spec["label"] = jax.ShapeDtypeStruct((batch_size,), np.int32)
  return Data(info, train, evaluate, cropped, spec, train_split, eval_split)


def stand_in(source: str, batch_size: int, image_size=None, channels: int | None = None,
             num_classes: int | None = None, train_examples: int = 1_281_167) -> Data:
  """Data that has shapes and cannot be read: for planning a run where its data set is not.

  The embedded source knows its own shapes; of others the caller has to say them.

  Raises:
    ValueError: the image size, channels or number of classes is not known.
  """
  if source.split("/")[0] == "glyphs":
    native, channels, num_classes = sources.glyphs_shape(source)
    size = image_size or native
  else:
    unknown = [field for field, value in {
      "augment.image_size": image_size, "model.channels": channels,
      "model.num_classes": num_classes}.items() if value is None]
    if unknown:
      raise ValueError(f"without the data of {source!r}, the config must say {', '.join(unknown)}")
    size = image_size
  size = (size, size) if isinstance(size, int) else tuple(size)
  spec = {"image": jax.ShapeDtypeStruct((batch_size, *size, channels), np.uint8)}
  if num_classes:
    spec["label"] = jax.ShapeDtypeStruct((batch_size,), np.int32)
  info = sources.Info((*size, channels), num_classes, (), {"train": train_examples}, "")
  return Data(info, None, None, True, spec, "train", None)


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


@functools.lru_cache(2)  # a batch touches two epochs at most
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return _generator(seed, SHUFFLE, epoch).permutation(n)


def shuffled(position: np.ndarray, *, n: int, seed: int) -> np.ndarray:
  """The example at each position of the endless sequence of epochs, each a permutation of n."""
  epoch, offset = np.divmod(position, n)
  index = np.empty_like(offset)
  for e in np.unique(epoch):
    index = np.where(epoch == e, _permutation(seed, int(e), n)[offset], index)
  return index


# Crops -------------------------------------------------------------------------------------------


def random_box(rng: np.random.Generator, area: tuple[float, float], ratio: tuple[float, float],
               height: int, width: int) -> tuple[int, int, int, int]:
  """A random crop (top, left, height, width), as in torchvision's RandomResizedCrop.

  Up to ten draws of a share of the image's area, uniform in `area`, and of an aspect ratio w/h,
  log-uniform in `ratio`; the first that fits is placed uniformly. If none does, the largest centre
  crop whose ratio is allowed.
  """
  for _ in range(10):
    target = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(*np.log(ratio)))
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def centre_box(size: tuple[int, int], margin: float, height: int,
               width: int) -> tuple[float, float, float, float]:
  """The crop (top, left, height, width) that resizing and then centre-cropping to `size` keeps.

  Resized so that `size` times `margin` is just covered, sides rounded to whole pixels; then the
  centre is cut out. Scaling this box to `size` gives the same pixels, to rounding, and no others.
  """
  scale = margin * max(size[0] / height, size[1] / width)
  h, w = round(height * scale), round(width * scale)
  top, left = round((h - size[0]) / 2), round((w - size[1]) / 2)
  return (top * height / h, left * width / w, size[0] * height / h, size[1] * width / w)


# Reading -----------------------------------------------------------------------------------------


def load(split, name: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
  """Decodes a whole split into arrays: image uint8 (n, h, w, c) and label int32 (n,) if any."""
  images = np.empty((len(split), *shape), np.uint8)

  def fill(start):
    records = split.__getitems__(range(start, min(start + 256, len(split))))
    for i, record in enumerate(records, start):
      image = sources.decode(record, shape[-1])
      if image.shape != shape:
        raise ValueError(f"{record['name']} is {image.shape}, not {shape} like the rest; set "
                         "data.cache_bytes=0 and augment.image_size to have images resized")
      images[i] = image
    return [record["label"] for record in records if "label" in record]

  starts = range(0, len(split), 256)
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    labels = sum(track(pool.map(fill, starts), f"decoding {name}", len(starts), transient=True,
                       disable=len(starts) < 100), [])
  return {"image": images} | ({"label": np.array(labels, np.int32)} if labels else {})


def stream(example: Callable[[int], dict], num_batches: int, batch_size: int, workers: int,
           ahead: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of example(0), example(1), ... by grain, in order, for any number of workers."""
  data = grain.MapDataset.range(num_batches * batch_size).map(example)
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # a notebook parses none, but grain's workers ask for theirs
    # Batched before the split among workers: whole batches, each made by one of them.
    data = data.batch(batch_size).to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)).map(
        lambda batch: {key: np.array(a) for key, a in batch.items()})  # out of shared memory
  else:
    data = data.to_iter_dataset(
      grain.ReadOptions(os.cpu_count(), ahead * batch_size + os.cpu_count())).batch(batch_size)
  iterator = iter(data)
  try:
    yield from iterator
  finally:
    iterator.close()  # ends the workers


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
