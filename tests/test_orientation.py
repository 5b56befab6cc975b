"""The way a camera was held: pictures are upright in training, in evaluation and by themselves."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import evaluate
from input_pipeline import batches, decode, geometry, viewing
from input_pipeline.records import Feature
from input_pipeline.sources import open_source

EXACT = {"png": {}, "webp": {"lossless": True}, "tiff": {}}


def picture(h=24, w=32):
  """No two corners alike, smooth."""
  y, x = np.mgrid[:h, :w]
  return np.stack([255 * x / w, 255 * y / h, 128 + 0 * x], -1).astype(np.uint8)


def encoded(array, kind, value, **options):
  exif, file = Image.Exif(), io.BytesIO()
  if value is not None:
    exif[decode.ORIENTATION] = value
  Image.fromarray(array).save(file, kind, exif=exif, **options)
  return file.getvalue()


def shown(data):
  """As viewers show it."""
  return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def record(data):
  return {"image": data, "name": "it"}


def see(data, box, size, coarse=False):
  look = geometry.Look(lambda h, w: geometry.Cut(box, size), "bicubic")
  return viewing.decode_looks(record(data), 3, [look], coarse)[0]


@pytest.mark.parametrize("kind", [*EXACT, "jpeg"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_are_upright(kind, value):
  data = encoded(picture(), kind, value, **EXACT.get(kind, {"quality": 95}))
  want, tolerance = shown(data), 0 if kind in EXACT else 3
  assert want.shape == ((32, 24, 3) if value > 4 else (24, 32, 3))
  np.testing.assert_allclose(decode.decode(record(data), 3).astype(int), want, atol=tolerance)
  assert decode.header(record(data)) == want.shape
  box = (2, 3, 10, 12)
  cut = np.asarray(Image.fromarray(want).resize((12, 10), box=(3, 2, 15, 12)))
  np.testing.assert_allclose(see(data, box, (10, 12)).astype(int), cut, atol=tolerance)


@pytest.mark.parametrize("value", range(1, 9))
def test_a_coarse_jpeg_is_cut_upright(value, monkeypatch):
  data = encoded(picture(480, 640), "jpeg", value, quality=95)
  decoded, jpeg = [], decode.jpeg
  monkeypatch.setattr(decode, "jpeg", lambda *a: decoded.append(jpeg(*a)) or decoded[-1])
  want, box = shown(data), (40, 120, 320, 200)
  got = see(data, box, (80, 50), coarse=True)
  assert decoded[0].size == (160, 120)  # a quarter, whichever side is up
  cut = Image.fromarray(want).resize((50, 80), Image.Resampling.BICUBIC, (120, 40, 320, 360))
  np.testing.assert_allclose(got.astype(int), np.asarray(cut), atol=4)


def late(data):
  """A PNG with its EXIF behind the pixels."""
  at = data.index(b"eXIf") - 4
  length = struct.unpack(">I", data[at:at + 4])[0] + 12
  end = data.index(b"IEND") - 4
  return data[:at] + data[at + length:end] + data[at:at + length] + data[end:]


def test_a_png_may_say_it_behind_its_pixels():
  data = late(encoded(picture(), "png", 6))
  assert data.index(b"IDAT") < data.index(b"eXIf")
  np.testing.assert_array_equal(decode.decode(record(data), 3), shown(data))
  assert decode.header(record(data)) == (32, 24, 3)
  assert see(data, (0, 0, 32, 24), (32, 24)).shape == (32, 24, 3)


def test_a_tiff_with_xmp_is_not_turned_twice():
  file, xmp = io.BytesIO(), b'<x xmlns:tiff="t" tiff:Orientation="6"/>'
  Image.fromarray(picture()).save(file, "tiff", tiffinfo={decode.ORIENTATION: 6, 700: xmp})
  assert "xmp" in Image.open(file).info
  want = np.asarray(Image.fromarray(picture()).transpose(Image.Transpose.ROTATE_270))
  np.testing.assert_array_equal(decode.decode(record(file.getvalue()), 3), want)
  assert decode.header(record(file.getvalue())) == (32, 24, 3)


def test_a_broken_mark_says_nothing():
  data = encoded(picture(), "png", None)
  chunk = b"eXIfno EXIF at all"
  chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
  broken = data[:33] + chunk + data[33:]
  np.testing.assert_array_equal(decode.decode(record(broken), 3), picture())
  assert decode.header(record(encoded(picture(), "jpeg", 9))) == (24, 32, 3)  # there is no ninth


def test_boxes_lie_in_the_upright_picture():
  array = np.zeros((24, 32, 3), np.uint8)
  array[4:8, 20:30] = 255  # once turned to the right: rows 20-29, columns 16-19
  features = {"image": Feature((None, None, 3), "uint8", "image"),
              "boxes": Feature((1, 4), "float32", "boxes")}
  look = geometry.Look(lambda h, w: geometry.Cut((12, 4, 20, 20), (20, 20)), "bicubic")
  got = viewing.read(record(encoded(array, "png", 6)) | {"boxes": [[20, 16, 30, 20]]}, features,
                   [look])
  np.testing.assert_array_equal(got["boxes"], [[8, 12, 18, 16]])
  expected = np.zeros((20, 20), np.uint8)
  expected[8:18, 12:16] = 255
  np.testing.assert_array_equal(got["image"][..., 0], expected)


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}])
def test_a_folder_of_one_camera_has_two_shapes(tmp_path, options):
  for i, value in enumerate((1, 6, 8, 3)):
    (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(), "jpeg", value, quality=95))
  assert open_source(f"folder:{tmp_path}").info.image_shape == (None, None, 3)
  data = batches.make(f"folder:{tmp_path}", batch_size=4, views=geometry.views(
    dict(image_size=(16, 16), eval_squash=True, train_crop="squash")), **options)
  for batch in (next(data.eval("train", 4)), next(data.train(0, 1))):
    means = batch["image"].astype(float).mean((1, 2))
    np.testing.assert_allclose(means, [[124, 122, 128]] * 4, atol=4)
  for path in sorted(tmp_path.iterdir())[::3]:
    path.unlink()
  assert open_source(f"folder:{tmp_path}").info.image_shape == (32, 24, 3)
  data = batches.make(f"folder:{tmp_path}", batch_size=2, **options)
  assert next(data.train(0, 1))["image"].shape == (2, 32, 24, 3)


def test_images_by_a_pattern_are_upright(tmp_path, monkeypatch):
  (tmp_path / "phone.jpg").write_bytes(encoded(picture(), "jpeg", 6))
  seen = []

  class Run:
    class config:
      class model:
        channels = 3
    tokenize = staticmethod(list)
    preprocess = staticmethod(lambda images: seen.append(images.shape) or images)
    predict = staticmethod(lambda name, batch: np.ones((len(batch.get("text", "x")), 2))
                           if name != "logit_scale" else 1.0)
  from evaluators import zero_shot
  monkeypatch.setattr(zero_shot, "class_embeddings", lambda *a: np.ones((2, 2)))
  monkeypatch.setattr(zero_shot, "classify", lambda *a: np.ones((1, 2)) / 2)
  evaluate.classify_images(Run, f"{tmp_path}/*.jpg", "a, b", ["{}"])
  assert seen == [(1, 32, 24, 3)]
