"""The sides of benchmarks/input.py do the same work, and what makes ours fast changes no pixels."""

import io
import itertools
import signal

import chex
import numpy as np
import pytest
from PIL import Image

from benchmarks import compare
from benchmarks import input as benchmark
from input_pipeline import decode, geometry, records, viewing


@pytest.mark.parametrize("side", benchmark.OURS)
def test_memory_batches_are_the_images_shuffled_with_their_labels(tmp_path, monkeypatch, side):
  monkeypatch.setitem(benchmark.BATCH, "memory", 8)
  benchmark.write_data(tmp_path, 24, 0)
  with np.load(tmp_path / "memory.npz") as file:
    known = {image.tobytes(): label for image, label in zip(file["image"], file["label"])}
  made = [*itertools.islice(benchmark.OURS[side](tmp_path, "memory"), 6)]
  for epoch in (made[:3], made[3:]):
    images, labels = (np.concatenate([batch[key] for batch in epoch]) for key in ("image", "label"))
    chex.assert_shape(images, (24, 32, 32, 3))
    assert {image.tobytes(): label for image, label in zip(images, labels)} == known
  orders = [batch["image"].tobytes() for batch in made]
  assert orders[:3] != orders[3:]


@pytest.mark.parametrize("side", benchmark.OURS)
def test_photos_are_cropped_mirrored_and_normalised(tmp_path, monkeypatch, side):
  monkeypatch.setitem(benchmark.BATCH, "jpeg", 8)
  ramp = np.tile(np.linspace(0, 255, 300), (260, 1))
  for i in range(10):  # the number in red, a ramp to the right in green
    folder = tmp_path / "jpeg" / str(i)
    folder.mkdir(parents=True)
    Image.fromarray(np.stack([0 * ramp + 20 * i, ramp, 0 * ramp], -1).astype(np.uint8)).save(
      folder / "0.jpg", quality=95, subsampling=0)
  batches = [*itertools.islice(benchmark.OURS[side](tmp_path, "jpeg"), 3)]
  images, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("image", "label"))
  chex.assert_shape(images, (24, 224, 224, 3))
  pixels = 255 * (images * np.float32(benchmark.STD) + np.float32(benchmark.MEAN))
  np.testing.assert_allclose(pixels[..., 0], np.broadcast_to(
    20 * labels[:, None, None], images.shape[:3]), atol=6)
  slope = (pixels[:, :, -10:, 1] - pixels[:, :, :10, 1]).mean((1, 2))
  assert 4 < (slope > 0).sum() < 20 and np.ptp(abs(slope)) > 60  # either way, and of several sizes


def test_photos_have_the_files_of_photographs():
  rng, sizes = np.random.default_rng(0), []
  for _ in range(3):
    file = io.BytesIO()
    Image.fromarray(benchmark.photo(rng, 400, 500)).save(file, "jpeg", quality=88)
    sizes.append(file.tell())
  assert 40_000 < min(sizes) and max(sizes) < 65_000


def test_sides_take_turns_and_ratios_are_of_neighbours(tmp_path, monkeypatch):
  """With sides that only say what they are told, and note who could have run meanwhile."""
  running, alone, sides = set(), [], {}

  class Side:
    def __init__(self, command, *_):
      self.name, self.cpu, self.process, self.pid = command[2][7:], 0.0, self, len(sides)
      sides[self.pid] = self
      running.add(self.name)

    def send_signal(self, which):
      (running.discard if which == signal.SIGSTOP else running.add)(self.name)
      self.cpu += 0.3 if which == signal.SIGSTOP else 0  # read ahead, after the answer

    def steps(self, n):
      alone.append(running == {self.name})
      self.cpu += n * {"ours": 0.04, "grain": 0.14}[self.name]
      return {"wall": 0.1}

    def __enter__(self):
      return self

    def __exit__(self, *_):
      assert self.name in running  # a stopped process would never end

  monkeypatch.setattr(compare, "Side", Side)
  monkeypatch.setattr(benchmark, "cpu_time", lambda pid: sides[pid].cpu)
  pythons = {"ours": "python", "grain": "python", "tf.data": None}
  rows = [*benchmark.compare(tmp_path, "memory", pythons, 3, 0.5)]
  assert all(alone) and len(alone) == 2 * (3 + 3)
  for (name, cpu, wall, ratios), (expected, seconds) in zip(
      rows, {"ours": 0.1, "grain": 0.2}.items(), strict=True):  # five steps, and 0.3 s more
    assert name == expected
    np.testing.assert_allclose([cpu, wall, *ratios], [
      256 / seconds, 2560, *[seconds / 0.1] * 3], rtol=1e-6)


def jpeg(array, **options):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "jpeg", **options)
  return file.getvalue()


@pytest.mark.parametrize("shape", [(5, 3), (67, 50), (180, 240)])
@pytest.mark.parametrize("options", [
  {}, {"subsampling": 0}, {"progressive": True}, {"keep_rgb": True}, {"quality": 20}])
def test_colour_jpegs_have_pillows_pixels(monkeypatch, shape, options):
  made, whole_jpeg = [], decode.simplejpeg.decode_jpeg
  monkeypatch.setattr(decode.simplejpeg, "decode_jpeg",
                      lambda *a, **k: made.append(whole_jpeg(*a, **k)) or made[-1])
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
  data = jpeg(np.asarray(small.resize(shape[::-1], Image.Resampling.BICUBIC)), **options)
  whole = Image.open(io.BytesIO(data))
  np.testing.assert_array_equal(decode.decode({"image": data, "name": ""}, 3), np.asarray(whole))
  assert [array.shape for array in made] == [(*shape, 3)]  # and Pillow did not have to
  drafted = Image.open(io.BytesIO(data))
  size = tuple(-(-side // 4) for side in shape)
  drafted.draft(None, size[::-1])
  # A box of the drafted image's own size: resizing is the identity, if sides are multiples of it.
  if not any(side % 4 for side in shape):
    look = geometry.Look(lambda h, w: geometry.Cut((0, 0, h, w), size), "bicubic")
    seen, = viewing.decode_looks({"image": data, "name": ""}, 3, [look], coarse=True)
    np.testing.assert_array_equal(seen, np.asarray(drafted))


def test_a_jpeg_with_a_fault_is_pillows_to_judge():
  data = jpeg(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
  spare = data[:-2] + bytes(20) + data[-2:]  # before the end's marker: a warning
  np.testing.assert_array_equal(decode.decode({"image": spare, "name": ""}, 3),
                                decode.decode({"image": data, "name": ""}, 3))
  with pytest.raises(records.BadRecord, match="cannot decode the image here: .*truncated"):
    decode.decode({"image": data[:len(data) // 2], "name": "here"}, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", [(0, 0, 75, 50), (3, 7, 60, 40), (3.3, 7.6, 30.2, 41.9)])
def test_resizing_is_pillows_to_rounding(monkeypatch, channels, box):
  array = np.random.default_rng(0).integers(64, 192, (75, 50, 3), np.uint8)  # nothing saturates
  data = io.BytesIO()
  Image.fromarray(array).save(data, "png")
  made = []
  look = geometry.Look(lambda *_: geometry.Cut(box, (28, 33)), "bicubic", exact=False)
  for module in (viewing.cykooz_resizer, None):
    monkeypatch.setattr(viewing, "cykooz_resizer", module)
    seen, = viewing.decode_looks({"image": data.getvalue(), "name": ""}, channels, [look])
    made.append(seen.astype(int))
  assert abs(made[0] - made[1]).max() <= 2 and abs((made[0] - made[1]).mean()) < 0.05
  assert made[0].std() > 5
