"""Times the input pipeline beside grain, tf.data and PyTorch: images a second on one core.

  python benchmarks/input.py [--cases=memory,jpeg] [--rounds=7] [--seconds=1]
                             [--python-tf=/path/to/python/with/tensorflow]
                             [--python-torch=/path/to/python/with/torch]

`memory`: decoded images of 32 x 32 x 3, shuffled, to batches of 256 (uint8, labels). `jpeg`: files
of 45 KB and about 500 x 400, shuffled, randomly cropped (8-100% of the area, 3/4 to 4/3) and
resized to 224, half of them mirrored and all normalised, to float32 batches of 64.

All of that is counted, wherever it runs: ours mirrors and normalises under jit, on the CPU, the
others in NumPy, TensorFlow or PyTorch. All resize bicubically, antialiased; "tf.data, bilinear" is
what most do there instead, and less work: no antialiasing. PyTorch has Pillow decode and resize, or
decode alone, and then resizes tensors of bytes. All have the C library's heap in huge pages, as
train.py has it. Each side is a process pinned to one core, with no workers, that takes its turn and
is stopped between (Linux). Ratios are of neighbours in time, above 1 where ours is faster, by
processor time over all threads: their median and quartiles. Sides whose Python is not given are
left out.
"""

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks import compare as beside
from benchmarks import worker
from benchmarks.peers.input import AREA, BATCH, MEAN, RATIO, SIZE, STD
from trainer import environment

PEER = "benchmarks/peers/input.py"
SIDES = {  # case -> the sides beside ours; the Python of a side is that of its first word
  "memory": ("grain", "tf.data", "torch"),
  "jpeg": ("grain", "tf.data", "tf.data, bilinear", "torch", "torch, tensors")}


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """uint8 noise with about the spectrum of a photograph: so is the size of its JPEG."""
  frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
  frequency[0, 0] = 1

  def plane(power):
    white = np.fft.rfft2(rng.normal(size=(height, width)))
    noise = np.fft.irfft2(white / frequency**power, s=(height, width))
    return noise / noise.std()
  light = 127 + 50 * plane(1.45)
  return np.stack([light + 15 * plane(1.6) for _ in range(3)], -1).clip(0, 255).astype(np.uint8)


def write_data(folder: Path, small: int, photos: int) -> None:
  """`memory/CLASS/*.png` and the same as `memory.npz`; `jpeg/CLASS/*.jpg`."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (small, 32, 32, 3), np.uint8)
  np.savez(folder / "memory.npz", image=images, label=np.arange(small, dtype=np.int32) % 10)
  shapes = [(375, 500), (400, 500), (333, 500), (500, 375), (500, 400)]
  for i in range(max(small, photos)):
    for case, count, suffix, image in (
        ("memory", small, "png", lambda i=i: images[i]),
        ("jpeg", photos, "jpg", lambda i=i: photo(rng, *shapes[i % len(shapes)]))):
      if i < count:
        path = folder / case / str(i % 10) / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": 88} if suffix == "jpg" else {"compress_level": 1}
        Image.fromarray(image()).save(path, **options)


def ours(folder: Path, case: str):
  """Batches as a run has them once they are on the device and augmented."""
  import jax

  from input_pipeline import batches, geometry
  from input_pipeline.augment import images as augment
  if case == "memory":
    return batches.make(f"folder:{folder}/memory", batch_size=BATCH[case]).train(0, 10**9)
  cut = dict(image_size=SIZE)
  data = batches.make(f"folder:{folder}/jpeg", batch_size=BATCH[case], cache_bytes=0,
                      views=geometry.views(dict(cut, crop_area=AREA, crop_ratio=RATIO)))
  recipe = augment.make(**cut, flip=True, mean=MEAN, std=STD)
  step = jax.jit(lambda i, batch: recipe.train(jax.random.fold_in(jax.random.key(0), i), batch))
  return (jax.block_until_ready(step(i, batch)) for i, batch in enumerate(data.train(0, 10**9)))


def plain_grain(folder: Path, case: str):
  """grain example by example, in Pillow and NumPy."""
  import grain

  from input_pipeline import geometry
  if case == "memory":
    with np.load(folder / "memory.npz") as file:
      arrays = {key: file[key] for key in file}
    data = grain.MapDataset.range(len(arrays["label"])).shuffle(seed=0).repeat().map(
      lambda i: {key: a[i] for key, a in arrays.items()})
    return iter(data.batch(BATCH[case]).to_iter_dataset(grain.ReadOptions(1, 2)))
  files = sorted((folder / case).rglob("*.jpg"))

  def example(i, rng):
    with Image.open(files[i]) as image:
      top, left, height, width = geometry.draw(rng, AREA, RATIO, image.height, image.width)
      image = np.asarray(image.convert("RGB").resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))
    image = image[:, ::-1] if rng.random() < 0.5 else image
    image = (image.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return {"image": image, "label": np.int32(files[i].parent.name)}
  data = grain.MapDataset.range(len(files)).seed(0).shuffle().repeat().random_map(example)
  return iter(data.to_iter_dataset(grain.ReadOptions(1, 2 * BATCH[case])).batch(BATCH[case]))


def cpu_time(pid: int) -> float:
  """Seconds of processor time of another process, over all threads: clock_getcpuclockid(3)."""
  return time.clock_gettime(~pid << 3 | 2)


OURS = {"ours": ours, "grain": plain_grain}  # the sides of this file; the others are PEER's


def compare(folder: Path, case: str, pythons: dict[str, str], rounds: int, seconds: float):
  """Yields (side, images/s of processor time, and by the clock, quartiles of the ratio)."""
  names = [name for name in ("ours", *SIDES[case]) if pythons.get(name.split(",")[0])]
  times = {name: [] for name in names}
  with contextlib.ExitStack() as stack:
    sides, batches = {}, {}
    for name in names:
      sides[name] = side = stack.enter_context(beside.Side(
        [pythons[name.split(",")[0]], __file__ if name in OURS else PEER, f"--side={name}",
         f"--cases={case}", f"--data={folder}"], "cpu", 1))
      batches[name] = max(1, round(seconds / min(side.steps(3)["wall"] for _ in range(3))))
      side.process.send_signal(signal.SIGSTOP)
      stack.callback(side.process.send_signal, signal.SIGCONT)
    for _ in range(rounds):
      for name, side in sides.items():
        began = cpu_time(side.process.pid)
        side.process.send_signal(signal.SIGCONT)
        wall = side.steps(batches[name])["wall"]
        side.process.send_signal(signal.SIGSTOP)  # or it would read ahead in the others' time
        # Not the side's own count, which misses what it read ahead between its answer and the stop.
        times[name].append(((cpu_time(side.process.pid) - began) / batches[name], wall))
  for name, taken in times.items():
    cpu, wall = (BATCH[case] / statistics.median(t) for t in zip(*taken))
    ratios = [theirs / own for (own, _), (theirs, _) in zip(times["ours"], taken)]
    yield name, cpu, wall, statistics.quantiles(ratios)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--cases", default="memory,jpeg")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=1.0, help="of each side in each round")
  parser.add_argument("--python-tf", help="a Python with tensorflow")
  parser.add_argument("--python-torch", help="a Python with torch and Pillow")
  parser.add_argument("--images", default="10000,500", help="how many, of each kind")
  parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--side", help=argparse.SUPPRESS)  # as a process of its own, see `Side`
  args = parser.parse_args()
  if args.side:
    batches = OURS[args.side](args.data, args.cases)
    return worker.serve(lambda: next(batches))
  pythons = {"ours": sys.executable, "grain": sys.executable, "tf.data": args.python_tf,
             "torch": args.python_torch}
  with tempfile.TemporaryDirectory() as folder:
    write_data(Path(folder), *map(int, args.images.split(",")))
    for case in args.cases.split(","):
      print(f"\n| {case} | images/s of CPU time | of the clock | ours is faster by | quartiles |\n"
            "|---|---|---|---|---|")
      for name, cpu, wall, (low, middle, high) in compare(
          Path(folder), case, pythons, args.rounds, args.seconds):
        print(f"| {name} | {cpu:,.0f} | {wall:,.0f} | {middle:.2f} | {low:.2f} - {high:.2f} |",
              flush=True)


if __name__ == "__main__":
  environment.keep_memory()
  main()
