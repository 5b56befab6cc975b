"""RandAugment of timm against Pillow, of big_vision against NumPy; what each draws."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import photo
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from input_pipeline import rand_augment
from input_pipeline.augment import images as augment
from trainer import recipe as recipes

FILL = (124, 116, 104)  # of ImageNet's mean, 0.485, 0.456, 0.406
ENHANCE = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
           "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
NAMES = rand_augment.OPERATIONS
FROM_TIMM = functools.partial(rand_augment.read, check=lambda ok, *_: None)


def timm(image, name, level, sign, increasing=True, resample=Image.BICUBIC):
  """timm/data/auto_augment.py's operation (the named one, or its "Increasing") by Pillow, uint8."""
  pil, (h, w), share = Image.fromarray(image), image.shape[:2], level / 10
  move = functools.partial(pil.transform, (w, h), Image.AFFINE, resample=resample, fillcolor=FILL)
  factor = 1 + sign * share * 0.9 if increasing else share * 1.8 + 0.1
  bits, threshold = int(share * 4), int(share * 256)
  bits, threshold = (4 - bits, 256 - threshold) if increasing else (bits, threshold)
  out = {
      "autocontrast": lambda: ImageOps.autocontrast(pil), "invert": lambda: ImageOps.invert(pil),
      "equalize": lambda: ImageOps.equalize(pil),
      # Pillow, before 13 refused it, made an image of 0 bits black.
      "posterize": lambda: ImageOps.posterize(pil, bits) if bits else 0 * image,
      "solarize": lambda: ImageOps.solarize(pil, threshold),
      "solarize_add": lambda: pil.point([min(255, i + int(share * 110)) if i < 128 else i
                                         for i in range(256)] * 3),
      "rotate": lambda: pil.rotate(30 * share * sign, resample=resample, fillcolor=FILL),
      "shear_x": lambda: move((1, 0.3 * share * sign, 0, 0, 1, 0)),
      "shear_y": lambda: move((1, 0, 0, 0.3 * share * sign, 1, 0)),
      "translate_x": lambda: move((1, 0, 0.45 * share * sign * w, 0, 1, 0)),
      "translate_y": lambda: move((1, 0, 0, 0, 1, 0.45 * share * sign * h)),
      **{kind: lambda kind=kind: ENHANCE[kind](pil).enhance(factor) for kind in ENHANCE}}
  return np.asarray(out[name]())


def operate(image, name, level, sign, fill=FILL, place=(0, 0), sampling="bicubic", **options):
  return np.asarray(OPERATE(np.float32(image), NAMES.index(name), level, sign,
                            jnp.float32(place), jnp.float32(fill).reshape(1, 1, -1),
                            sampling=sampling, **options))


OPERATE = jax.jit(rand_augment.operate, static_argnames=("level", "sampling", "increasing"))
LEVELS = (0.0, 1.3, 4.0, 5.0, 8.7, 9.0, 9.4, 10.0)
RESAMPLE = {"linear": Image.BILINEAR, "bicubic": Image.BICUBIC}


@pytest.mark.parametrize("name", NAMES[:-1])
def test_operation_is_timms(name):
  image, moved = photo(33, 40, seed=3) // 2 + 40, collections.defaultdict(list)
  # A program is compiled for each but the sign: all levels one way, two of them every way.
  ways = {*itertools.product(LEVELS, (True,), ("bicubic",)),
          *itertools.product((4.0, 9.0), (True, False), RESAMPLE)}
  for (level, increasing, sampling), sign in itertools.product(sorted(ways), (1, -1)):
    want = timm(image, name, level, sign, increasing, RESAMPLE[sampling])
    got = operate(image, name, level, sign, sampling=sampling, increasing=increasing)
    apart = np.abs(got - want)
    # Pillow cuts what it computes in double precision, and so a whole number that it just misses.
    assert apart.max() <= (0 if name in rand_augment.TABLES else 1), (level, sign)
    assert (apart > 0).mean() < 0.1
    moved[level].append((apart > 0).mean())
  assert np.mean(moved[8.7] + moved[9.4]) < 2e-3  # at levels that hit no fraction in both
  assert any((operate(image, name, level, 1, increasing=True) != image).mean() > 0.3
             for level in LEVELS)


@pytest.mark.parametrize("sampling", RESAMPLE)
def test_what_is_flat_stays_to_the_bit(sampling):
  image = np.full((24, 30, 3), 201, np.uint8)
  for name in ("autocontrast", "equalize", *rand_augment.MOVES, "color", "contrast", "sharpness"):
    got = operate(image, name, 7.3, 1, fill=(201,), sampling=sampling, increasing=True)
    np.testing.assert_array_equal(got, image, name)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels):
  image = photo(20, 24, channels, seed=2)
  for name in NAMES[:-1]:
    got = operate(image, name, 9.0, -1, fill=(7,), increasing=True)
    assert got.shape == image.shape and got.min() >= 0 and got.max() <= 255
    np.testing.assert_array_equal(got, np.round(got))
  if channels == 1:  # a gray image is its own luma
    want = ImageEnhance.Contrast(Image.fromarray(image[..., 0])).enhance(0.19)
    got = operate(image, "contrast", 9.0, -1, fill=(7,), increasing=True)[..., 0]
    assert np.abs(got - np.asarray(want)).max() <= 1


def nearest(image, coordinates, fill):
  """TensorFlow Addons' projective transform: coordinates (x, y) -> where the input is read."""
  out = np.empty_like(image)
  for y, x in np.ndindex(image.shape[:2]):
    i, j = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in coordinates(x, y)[::-1])
    inside = 0 <= i < image.shape[0] and 0 <= j < image.shape[1]
    out[y, x] = image[i, j] if inside else fill
  return out


def numpy_blend(start, image, factor):
  return np.clip(start + factor * (image - start), 0, 255).astype(np.uint8)


def big_vision(image, name, level, sign, place, fill):
  """big_vision/pp/archive/autoaugment.py's operation in NumPy; pixels as at 224, in proportion."""
  (h, w, _), share = image.shape, level / 10
  move, factor, real = sign * share, 0.1 + 1.8 * share, image.astype(np.float64)
  c, s = math.cos(move * math.pi / 6), math.sin(move * math.pi / 6)
  x0, y0 = (w - 1) / 2, (h - 1) / 2
  gray = np.floor(real @ [0.2989, 0.587, 0.114] * 255.5 / 255)[..., None]
  smooth = real.copy()
  around = sum(np.roll(real, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
  smooth[1:-1, 1:-1] = np.floor((around + 4 * real)[1:-1, 1:-1] / 13 + 1e-9)
  threshold = np.array(int(share * 256)).astype(np.uint8)  # as TensorFlow converts it: 384 is 128
  drop = 8 - min(max(int(share * 4), 1), 8)
  add = np.where(image < 128, np.minimum(image + np.int64(share * 110), 255), image)
  pad, (row, column) = int(share * 40 * min(h, w) / 224), place
  cut = image.copy()
  cut[max(0, row - pad):row + pad, max(0, column - pad):column + pad] = fill
  pil = Image.fromarray(image)
  table = {  # three that are Pillow's to the bit
      "autocontrast": lambda: ImageOps.autocontrast(pil), "invert": lambda: ImageOps.invert(pil),
      "equalize": lambda: ImageOps.equalize(pil)}
  coordinates = {
      "rotate": lambda x, y: (c * (x - x0) - s * (y - y0) + x0, s * (x - x0) + c * (y - y0) + y0),
      "shear_x": lambda x, y: (x + 0.3 * move * y, y),
      "shear_y": lambda x, y: (x, y + 0.3 * move * x),
      "translate_x": lambda x, y: (x + 100 / 224 * w * move, y),
      "translate_y": lambda x, y: (x, y + 100 / 224 * h * move)}
  if name in coordinates:
    return nearest(image, coordinates[name], fill)
  return np.asarray(table[name]() if name in table else {
      "posterize": (image >> drop) << drop,
      "solarize": np.where(image < threshold, image, 255 - image),
      "solarize_add": np.uint8(add), "color": numpy_blend(gray, real, factor),
      "contrast": numpy_blend(np.full_like(real, 196), real, factor),  # 224 * 224 / 256
      "brightness": numpy_blend(0 * real, real, factor), "cutout": cut,
      "sharpness": numpy_blend(smooth, real, factor)}[name])


@pytest.mark.parametrize("name", NAMES)
def test_operation_is_big_visions(name):
  image, place = photo(36, 36, seed=5) // 2 + 40, (30, 8)
  changes = 0
  for level, sign in itertools.product((0.0, 2.0, 7.0, 10.0, 15.0, 20.0), (1, -1)):
    want = big_vision(image, name, level, sign, place, 128)
    got = operate(image, name, level, sign, fill=(128,), place=place, sampling="nearest")
    apart = np.abs(got - want)
    if name in rand_augment.MOVES:  # a pixel half way between two may go to the other one
      assert (apart > 0).mean() < 0.02
    else:
      assert apart.max() <= (1 if name in rand_augment.BLENDS else 0)
      assert (apart > 0).mean() < 0.05
    changes += (got != image).mean() > 0.05
  assert changes > 2


def drawn(monkeypatch, value, n=4000, size=(20, 30)):
  """What `operate` is asked for, one layer, n times: op, level, sign, place."""
  options = FROM_TIMM(value, "bicubic") | dict(layers=1)
  monkeypatch.setattr(rand_augment, "operate", lambda image, op, level, sign, place, *_:
                      jnp.zeros_like(image).at[0, :5, 0].set(
                          jnp.stack([op, level, sign, *place]).astype(jnp.float32)))
  run = jax.vmap(lambda key: rand_augment.rand_augment(
      key, jnp.ones((*size, 1)), jnp.zeros((1, 1, 1)), **options))
  out = np.asarray(run(jax.random.split(jax.random.key(0), n)))[:, :, :, 0] * 255
  return out[:, 0, :5], (out == 255).all((1, 2))


def test_timms_law(monkeypatch):
  asked, left = drawn(monkeypatch, "rand-m9-mstd0.5-inc1")
  assert 1858 < left.sum() < 2142  # a layer in two does nothing: 2,000 +- 4.5 deviations
  op, level, sign, *_ = asked[~left].T
  counts = np.bincount(np.round(op).astype(int), minlength=15)
  assert len(counts) == 15 and 85 < counts.min() <= counts.max() < 182  # 133 +- 4.3 deviations
  rng = np.random.default_rng(0)
  want = np.clip(rng.normal(9, 0.5, 100_000), 0, 10)
  np.testing.assert_allclose(np.quantile(level, [0.02, 0.25, 0.5, 0.75, 0.97]),
                             np.quantile(want, [0.02, 0.25, 0.5, 0.75, 0.97]), atol=0.08)
  assert abs(level.max() - 10) < 1e-4 and 0.005 < (level > 9.999).mean() < 0.045  # 0.023
  assert abs(sign.mean()) < 0.1 and abs(np.abs(sign) - 1).max() < 1e-4
  assert np.abs(np.corrcoef([op, level, sign]) - np.eye(3)).max() < 0.1


def test_big_visions_law(monkeypatch):
  asked, left = drawn(monkeypatch, (2, 15))
  assert not left.any()
  op, level, sign, row, column = np.round(asked.T, 3)
  counts = np.bincount(op.astype(int), minlength=16)
  assert len(counts) == 16 and 181 < counts.min() <= counts.max() < 319  # 250 +- 4.5 deviations
  assert (level == 15).all() and abs(sign.mean()) < 0.08
  assert {*row} == {*range(20)} and {*column} == {*range(30)}


@pytest.mark.parametrize("value, least", [("rand-m9-inc1-p1", 1.0), ((2, 7), 0.7)])
def test_each_layer_works_on_the_result_of_the_one_before(value, least):
  """In big_vision an eighth of the draws has a Cutout, anywhere, which is not looked for here."""
  image = photo(16, 18, seed=5)
  options = FROM_TIMM(value, "bicubic")
  run = jax.jit(jax.vmap(lambda key: rand_augment.rand_augment(
      key, jnp.float32(image) / 255, jnp.float32(FILL).reshape(1, 1, 3) / 255, **options)))
  got = np.asarray(run(jax.random.split(jax.random.key(1), 60))) * 255
  once = ((lambda x, name, sign: timm(x, name, 9.0, sign)) if least == 1 else
          (lambda x, name, sign: big_vision(x, name, 7.0, sign, (0, 0), FILL)))
  signed = [(name, sign) for name in NAMES[:-1] for sign in (1, -1)]
  first = [once(image, *one) for one in signed]
  twice = np.stack([once(x, *two) for x in first for two in signed])
  apart = np.array([np.mean(np.abs(one[None] - twice) > 0.5, (1, 2, 3)) for one in got])
  found = apart.min(1) < 0.03
  assert found.mean() >= least and np.median(apart.min(1)) < 1e-3
  assert len({*apart.argmin(1)[found]}) > 35  # of 225 pairs of operations


def test_the_recipe_rounds_and_fills_with_the_mean():
  image, mean = photo(20, 20, seed=1), (0.485, 0.456, 0.406)
  batch = {"image": np.repeat(image[None], 64, 0)}
  recipe = augment.make(image_size=20, mean=mean, randaugment="rand-m9-n1-p1-mstd0.5-inc1")
  got = recipe.to_pixels(jax.jit(recipe.train)(jax.random.key(0), batch)["image"]) * 255
  np.testing.assert_allclose(got, np.round(got), atol=1e-3)
  filled = (np.abs(got - np.array(FILL)) < 0.01).all(-1).mean((1, 2))
  assert 4 < (filled > 0.04).sum() < 40  # of 64, a third are moves


@pytest.mark.parametrize("text, want", [
    ("rand-m7-n3-p0.25-mstd1.5-inc1", dict(layers=3, magnitude=7.0, deviation=1.5, prob=0.25,
                                           increasing=True, sampling="linear")),
    ("rand", dict(layers=2, magnitude=10.0, deviation=0, prob=0.5, increasing=False,
                  sampling="linear")),
    ("rand-inc0-m9", dict(layers=2, magnitude=9.0, deviation=0, prob=0.5, increasing=False,
                          sampling="linear"))])
def test_timms_spelling(text, want):
  for interpolation in ("linear", "bilinear"):
    assert FROM_TIMM(text, interpolation) == want


def test_the_command_line_gives_either(monkeypatch):
  config = ConfigDict(dict(augment=dict(randaugment="rand-m9-mstd0.5-inc1"), data={}))
  for text, want in (("(2, 15)", (2, 15)), ("rand-m5", "rand-m5"), ("none", None),
                     ("rand-m9-inc1", "rand-m9-inc1")):
    recipes.override(config, "augment.randaugment", text)
    assert config.augment.randaugment == want
    config.augment.image_size = 8
    recipes.make_augment(config)
  recipes.override(config, "augment.randaugment", "9")
  with pytest.raises(ValueError, match=r"augment\.randaugment = '9': must be timm's 'rand'"):
    recipes.make_augment(config)


@pytest.mark.parametrize("name, randaugment, mix_size, partner", [
    ("finetune.py:imagenet_mae_b16", "rand-m9-mstd0.5-inc1", 32, "mirror"),
    ("finetune.py:imagenet_mae_l16", "rand-m9-mstd0.5-inc1", 32, "mirror"),
    ("finetune.py:imagenet_mae_h14", "rand-m9-mstd0.5-inc1", 16, "mirror"),
    ("vit.py:imagenet_s16", None, 256, "mirror"), ("vit.py:imagenet_b16", None, 256, "mirror"),
    ("vit.py:imagenet_l16", None, 64, "mirror"), ("vit.py:imagenet_h14", None, 64, "mirror"),
    ("vit.py:imagenet_b16_augreg", (2, 15), None, "previous"),
    ("vit.py:imagenet_s16_plain", (2, 10), None, "previous")])
def test_published_recipes(name, randaugment, mix_size, partner):
  """As facebookresearch/mae FINETUNE.md, deit README_revenge.md, big_vision configs/vit_*i1k.py."""
  config = recipes.load_config(f"configs/{name}").augment
  assert config.get("randaugment") == randaugment and config.get("mix_size") == mix_size
  assert config.get("mix_partner", "mirror") == partner
