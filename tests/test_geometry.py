"""What of an image is seen: torchvision's and the papers' geometry, the same through every door."""

import functools
import json
import math

import chex
import jax
import numpy as np
import pytest
from arrays import photo
from PIL import Image
from tiers import suite

import train
from input_pipeline import batches, geometry, viewing
from trainer import checkpoints, recipe

FILTERS = {"linear": Image.BILINEAR, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC,
           "lanczos3": Image.LANCZOS}


def view(**fields):
  return geometry.view("augment", **{"image_size": 24, **fields})


def seen(image, cut, interpolation="bicubic", **options):
  return viewing.see_array(image, geometry.Look(lambda h, w: cut, interpolation, **options))


def torchvision(image, size, resized_side, pillow=Image.BICUBIC):
  """Resize(resized_side), CenterCrop(size): transforms/functional.py's sides and corner."""
  h, w, _ = image.shape
  short, long = sorted((h, w))
  other = int(resized_side * long / short)
  new = (resized_side, other) if h <= w else (other, resized_side)
  top, left = (int(round((n - size) / 2.0)) for n in new)
  whole = np.asarray(Image.fromarray(image).resize(new[::-1], pillow))
  return whole[top:top + size, left:left + size]


@pytest.mark.parametrize("shape", [(40, 60), (61, 47), (75, 50), (33, 100), (24, 24)])
@pytest.mark.parametrize("name", FILTERS)
def test_evaluation_is_torchvisions_resize_and_centre_crop(shape, name):
  image = photo(*shape) // 2 + 64  # nothing saturates
  for ratio, side in ((0.875, 27), (1.0, 24), (0.6, 40)):
    got = viewing.evaluation_pixels(view(eval_crop=ratio, interpolation=name), image[None])[0]
    # One resampling of the centre, for one of all and a cut: to rounding between its two passes.
    np.testing.assert_allclose(got, torchvision(image, 24, side, FILTERS[name]), atol=1)


def test_published_sides():
  """224 of 256 (torchvision's references), 192 of 219 and 384 of 438 (timm: floor), 224 of 248."""
  for size, ratio, side in ((224, 0.875, 256), (192, 0.875, 219), (384, 0.875, 438),
                            (224, 0.9, 248), (518, 518 / 592, 592)):
    cut = geometry.for_evaluation(view(image_size=size, eval_crop=ratio), 480, 640)
    np.testing.assert_allclose(cut.box[2], 480 * size / side)
    np.testing.assert_allclose(cut.box[3], 640 * size / (640 * side // 480))


def test_squash_sees_all():
  image = photo(40, 61)
  got = viewing.evaluation_pixels(
    view(image_size=(20, 30), eval_squash=True, interpolation="linear"), image[None])[0]
  np.testing.assert_array_equal(
    got, np.asarray(Image.fromarray(image).resize((30, 20), Image.BILINEAR)))


def test_images_of_several_sizes_and_channels():
  images = [photo(40, 60), photo(50, 30), photo(24, 24)]
  got = viewing.evaluation_pixels(view(eval_crop=0.875), images)
  for image, one in zip(images, got, strict=True):
    chex.assert_trees_all_equal(one, viewing.evaluation_pixels(view(eval_crop=0.875),
                                                                image[None])[0])
  two = viewing.evaluation_pixels(view(), [photo(40, 60)[..., :2]])
  np.testing.assert_array_equal(two[0], viewing.evaluation_pixels(
    view(), photo(40, 60)[None])[0][..., :2])
  for wrong in (photo(8, 8)[None] / 255, [photo(8, 8)[..., 0]]):
    with pytest.raises(ValueError, match="must be uint8"):
      viewing.evaluation_pixels(view(), wrong)


def test_clips_square_is_anywhere_along_the_longer_side():
  """2103.00020 sec. 2.4: a random square of the resized image. 480 x 640 at 224: 75 places."""
  clip = recipe.make_views(recipe.load_config("configs/clip.py:vit_b32"))[0]
  rng = np.random.default_rng(0)
  boxes = np.array([geometry.for_training(clip, rng, 480, 640).box for _ in range(2000)])
  left = boxes[:, 1] * 298 / 640  # the resized image is 224 x 298
  np.testing.assert_allclose(left, np.round(left), atol=1e-9)
  assert {*np.round(left)} == {*range(75)} and not boxes[:, 0].any()
  counts = np.bincount(np.round(left).astype(int))
  assert 8 < counts.min() and counts.max() < 55  # 26.7 +- 5.5 standard deviations
  np.testing.assert_allclose(boxes[:, 2:], [[480, 640 * 224 / 298]] * 2000)


def test_random_boxes_have_the_area_and_ratio_asked_for():
  area, ratio, h, w = (0.1, 0.5), (1 / 2, 2.0), 600, 600
  boxes = np.array([geometry.draw(np.random.default_rng(i), area, ratio, h, w)
                    for i in range(2000)], np.float64)
  top, left, bh, bw = boxes.T
  assert (top >= 0).all() and (top + bh <= h).all() and (left >= 0).all() and (left + bw <= w).all()
  share, aspect = bh * bw / (h * w), np.log(bw / bh) / math.log(2)
  # Nearly every first draw fits in a square at these areas: uniform, and log-uniform.
  np.testing.assert_allclose(np.quantile(share, [0, 0.5, 1]), [0.1, 0.3, 0.5], atol=0.02)
  np.testing.assert_allclose(np.quantile(aspect, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.06)
  free = bh < 400
  np.testing.assert_allclose((top / (h - bh))[free].mean(), 0.5, atol=0.02)


@pytest.mark.parametrize("shape, expected", [
  ((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100)),
  ((90, 100), (0, 0, 90, 100))])
def test_when_no_box_fits_the_largest_allowed_is_centred(shape, expected):
  rng = np.random.default_rng(0)
  assert geometry.draw(rng, (4.0, 4.0), (3 / 4, 4 / 3), *shape) == expected


@pytest.mark.parametrize("shape", [(12, 12), (24, 30)])
def test_padded_crop_is_a_window_of_the_reflected_image(shape):
  image, made = photo(*shape), view(image_size=12, crop_padding=3)
  h, w = geometry.covering(*shape, (12, 12))
  resized = np.asarray(Image.fromarray(image).resize((w, h), Image.BICUBIC))
  padded = np.pad(resized, ((3, 3), (3, 3), (0, 0)), mode="reflect")
  windows = np.lib.stride_tricks.sliding_window_view(padded, (12, 12), (0, 1))  # i j c 12 12
  windows, found = windows.transpose(0, 1, 3, 4, 2), set()
  for seed in range(400):
    got = seen(image, geometry.for_training(made, np.random.default_rng(seed), *shape))
    place = np.argwhere((windows == got).all((2, 3, 4)))
    assert len(place) == 1
    found.add(tuple(place[0].tolist()))
  assert {i for i, _ in found} == {*range(7)} and {j for _, j in found} == {*range(w - 5)}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(16, 12), (50, 64)])
def test_resampling_is_pillows_by_every_filter(monkeypatch, name, size):
  image, box = photo() // 2 + 64, (4, 7, 25, 21)
  want = np.asarray(Image.fromarray(image).resize(size[::-1], FILTERS[name], (7, 4, 28, 29)))
  np.testing.assert_array_equal(seen(image, geometry.Cut(box, size), name), want)
  fast = seen(image, geometry.Cut(box, size), name, exact=False).astype(int)
  assert abs(fast - want).max() <= 2 and abs((fast - want).mean()) < 0.1
  monkeypatch.setattr(viewing, "cykooz_resizer", None)
  np.testing.assert_array_equal(seen(image, geometry.Cut(box, size), name, exact=False), want)


# --- The same through every door ------------------------------------------------------------------

N = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Photographs of 40 x 60, in two splits and two classes."""
  root = tmp_path_factory.mktemp("photos")
  for i in range(N):
    for split in ("train", "test"):
      path = root / split / f"c{i % 2}" / f"{i:02}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(photo(40, 60, seed=i + 100 * (split == "test"))).save(path, quality=95)
  return root


VIEWS = {
  "area": dict(crop_area=(0.2, 1.0), eval_crop=0.875), "random": dict(train_crop="random"),
  "padding": dict(crop_padding=4), "squash": dict(train_crop="squash", eval_squash=True),
  "centre": dict(eval_crop=0.8),
  "two": dict(crop_area=(0.2, 1.0), interpolation="linear",
              second_view=dict(crop_area=(0.05, 0.3), interpolation="bicubic"))}


@pytest.mark.parametrize("kind", suite(VIEWS, 0, 1))
def test_cached_and_streamed_images_are_cut_alike(folder, kind):
  make = functools.partial(batches.make, f"folder:{folder}", batch_size=5,
                           views=geometry.views(dict(image_size=16, **VIEWS[kind])))
  cached, streamed, workers = make(), make(cache_bytes=0), make(cache_bytes=0, workers=1)
  want = list(cached.train(1, 4))
  assert {"image_2"} & {*want[0]} == ({"image_2"} if kind == "two" else set())
  for name, array in want[0].items():
    assert cached.spec[name] == jax.ShapeDtypeStruct(array.shape, array.dtype)
  chex.assert_trees_all_equal(want, list(streamed.train(1, 4)))
  chex.assert_trees_all_equal(want, list(workers.train(1, 4)))
  chex.assert_trees_all_equal(list(cached.eval()), list(streamed.eval()))
  rows = np.arange(5)[::2]
  for whole, part in zip(want, cached.train(1, 4, rows), strict=True):
    chex.assert_trees_all_equal({key: x[rows] for key, x in whole.items()}, part)
  if kind == "two":
    assert np.abs(want[0]["image"].astype(int) - want[0]["image_2"]).mean() > 5


@pytest.mark.parametrize("interpolation", ["linear", "lanczos3"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_interpolation_is_heeded(folder, interpolation, cache_bytes):
  def first(name):
    views = geometry.views(dict(image_size=16, interpolation=name, crop_area=(0.2, 1.0)))
    data = batches.make(f"folder:{folder}", batch_size=5, views=views, cache_bytes=cache_bytes)
    return next(data.train(0, 1))["image"].astype(int), next(data.eval())["image"]
  (got, seen_then), (other, seen_by_other) = first(interpolation), first("bicubic")
  assert np.abs(got - other).mean() > 0.3  # smooth pictures: Lanczos's differ from bicubic's by 0.7
  files = sorted((folder / "test").rglob("*.jpg"))[:5]
  want = [np.asarray(Image.open(file).resize((16, 16), FILTERS[interpolation], (10, 0, 50, 40)))
          for file in files]
  np.testing.assert_allclose(seen_then, np.stack(want), atol=1)
  assert np.abs(seen_then.astype(int) - seen_by_other).mean() > 0.3


def test_a_boxs_place_follows_from_seed_and_position(folder):
  make = functools.partial(batches.make, f"folder:{folder}", views=geometry.views(
    dict(image_size=16, crop_area=(0.2, 1.0))))
  images = [np.concatenate([b["image"] for b in make(batch_size=n).train(0, 12 // n)])
            for n in (2, 3, 12)]
  chex.assert_trees_all_equal(*images)  # however they are put together
  other = np.concatenate([b["image"] for b in make(batch_size=12, seed=1).train(0, 1)])
  assert np.abs(other.astype(int) - images[0]).mean() > 5


@pytest.mark.parametrize("cached", suite(["0", "1000000"], 0))
def test_a_notebook_sees_what_evaluation_sees(folder, tmp_path, cached):
  """A run's `preprocess`, on whole images, gives what the run's evaluation reads and normalises."""
  options = {"augment.eval_crop": "0.8", "augment.crop_area": "(0.3,1)", "augment.image_size": "16",
             "augment.interpolation": "linear", "augment.mean": "(0.4,0.5,0.6)"}
  assert train.main([
    "--config=configs/vit.py:smoke", f"--workdir={tmp_path}/run", "--config.total_steps=1",
    "--config.schedule.warmup_steps=0", f"--config.data.source=folder:{folder}",
    "--config.data.batch_size=8", f"--config.data.cache_bytes={cached}",
    "--config.evals.classification=none",
    *(f"--config.{key}={value}" for key, value in options.items())]) == 0
  run = checkpoints.load_run(tmp_path / "run")
  files = sorted((folder / "test").rglob("*.jpg"))
  whole = np.stack([np.asarray(Image.open(file)) for file in files])
  data = recipe.make_data(run.config, None)
  read = np.concatenate([b["image"][b["valid"]] for b in data.eval()])
  got = run.preprocess(whole)
  np.testing.assert_array_equal(got, run.normalise(read))
  np.testing.assert_array_equal(got, run.preprocess([*whole]))
  want = np.stack([torchvision(image, 16, 20, Image.BILINEAR) for image in whole])
  np.testing.assert_allclose(got * 127.5 + 255 * np.array([0.4, 0.5, 0.6]), want, atol=1.01)
  # What was trained, without a field that older code did not write.
  config = recipe.plain(run.config)
  assert config["augment"]["eval_crop"] == 0.8


def test_runs_of_before_are_evaluated_as_before(tmp_path):
  for section, want in (({"crop_area": [0.2, 1]}, 0.875), ({}, None),
                        ({"crop_area": [0.2, 1], "eval_crop": 1.0}, 1.0)):
    (tmp_path / "config.json").write_text(json.dumps({"augment": section}))
    assert checkpoints.load_config(tmp_path).augment.get("eval_crop") == want
