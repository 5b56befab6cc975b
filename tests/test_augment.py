"""Augmentation on the device against Pillow, colorsys, NumPy; recipes on one device and eight."""

import collections
import colorsys
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import photo
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tiers import suite

from input_pipeline import colours, erasing, image_ops, mixing
from input_pipeline.augment import images as augment
from trainer import fields
from trainer import recipe as recipes

LEVEL = 1 / 255


def batch_of(n, h=24, w=24, c=3):
  return {"image": np.stack([photo(h, w, c, seed) for seed in range(n)]),
          "label": np.arange(n, dtype=np.int32)}


def to_float(image):
  return jnp.asarray(image, jnp.float32) / 255


def per_plane(image, apply):
  """Applies a Pillow function in float mode "F" to each channel: no rounding in the reference."""
  return np.stack([np.asarray(apply(Image.fromarray(np.float32(image[..., i]) / 255)))
                   for i in range(image.shape[-1])], -1)


def numpy_warp(image, matrix, fill):
  """Bilinear, one pixel after the other, in float64."""
  h, w, c = image.shape
  padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), constant_values=fill)
  out = np.full((h, w, c), fill, np.float64)
  for y in range(h):
    for x in range(w):
      u, v, _ = matrix @ [x - (w - 1) / 2, y - (h - 1) / 2, 1]
      u, v = u + (w - 1) / 2 + 1, v + (h - 1) / 2 + 1
      if 0 <= u < w + 1 and 0 <= v < h + 1:
        i, j = int(v), int(u)
        a, b = v - i, u - j
        out[y, x] = ((1 - a) * ((1 - b) * padded[i, j] + b * padded[i, j + 1])
                     + a * ((1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]))
  return out


def numpy_move(angle=0.0, shear_x=0.0, shear_y=0.0, move_x=0.0, move_y=0.0, scale=1.0):
  c, s = np.cos(angle), np.sin(angle)
  turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
  shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, scale]])
  move = np.array([[1, 0, move_x], [0, 1, move_y], [0, 0, 1]])
  return move @ turn @ (shear / scale)


@pytest.mark.parametrize("move", [
    dict(angle=0.4), dict(shear_x=0.3, shear_y=-0.1), dict(move_x=3.5, move_y=-2, scale=1.3),
    dict(angle=-0.7, shear_x=0.2, move_x=1, scale=0.8)])
def test_warp_is_pillows_inside_and_numpys_everywhere(move):
  image, zero = photo(), dict.fromkeys(("angle", "shear_x", "shear_y", "move_x", "move_y"), 0.0)
  matrix = numpy_move(**move)
  np.testing.assert_allclose(image_ops.affine_matrix(**(zero | move)), matrix, atol=1e-6)
  got = image_ops.warp(to_float(image), jnp.float32(matrix), jnp.float32([[[0.25]]]))
  np.testing.assert_allclose(got, numpy_warp(image / 255, matrix, 0.25), atol=5e-5)
  h, w, _ = image.shape  # Pillow's data maps corners, not centres: conjugate by the shift
  data = np.linalg.inv(shift := np.array([[1, 0, -w / 2], [0, 1, -h / 2], [0, 0, 1]]))
  data = (data @ matrix @ shift)[:2].ravel()
  want = per_plane(image, lambda x: x.transform((w, h), Image.AFFINE, data, Image.BILINEAR))
  y, x = np.mgrid[:h, :w]
  u, v, _ = np.einsum("ij,jhw->ihw", matrix, [x - (w - 1) / 2, y - (h - 1) / 2, np.ones((h, w))])
  inside = (np.abs(u) < (w - 1) / 2) & (np.abs(v) < (h - 1) / 2)  # beyond, Pillow blends no fill
  assert inside.mean() > 0.3
  np.testing.assert_allclose(np.asarray(got)[inside], want[inside], atol=5e-5)
  edge = image_ops.warp(to_float(np.full_like(image, 90)), jnp.float32(matrix))
  np.testing.assert_allclose(edge, 90 / 255, atol=1e-6)


def test_random_affine_stays_in_its_range():
  image = np.zeros((31, 31, 1), np.float32)
  image[15, 20] = 1  # five pixels right of the centre: it shows where the move sends it
  move = functools.partial(image_ops.random_affine, image=jnp.asarray(image), degrees=20.0,
                           scale=(0.8, 1.2))
  out = np.asarray(jax.vmap(move)(jax.random.split(jax.random.key(0), 200)))[..., 0]
  y, x = np.mgrid[:31, :31] - 15
  mass = out.sum((1, 2))
  angle = np.degrees(np.arctan2((out * y).sum((1, 2)) / mass, (out * x).sum((1, 2)) / mass))
  radius = np.hypot((out * y).sum((1, 2)), (out * x).sum((1, 2))) / mass
  # A centroid of bilinear weights is off by a fraction of a pixel, at five pixels a few degrees.
  assert angle.min() < -14 and angle.max() > 14 and np.abs(angle).max() < 26
  assert radius.min() < 4.4 and radius.max() > 5.6 and 3.5 < radius.min() < radius.max() < 6.5


PILLOW = {  # name: (our function of a float image, Pillow's of a uint8 image, tolerance in levels)
    "grayscale": (colours.grayscale, lambda x: ImageOps.grayscale(x).convert("RGB"), 1),
    "solarize": (colours.solarize, ImageOps.solarize, 0.01),
    "saturation": (lambda x: colours.blend(colours.grayscale(x), x, 0.3),
                   lambda x: ImageEnhance.Color(x).enhance(0.3), 1.5),
    "contrast": (lambda x: colours.blend(colours.grayscale(x).mean(), x, 1.9),
                 lambda x: ImageEnhance.Contrast(x).enhance(1.9), 2),  # Pillow rounds the mean
    "brightness": (lambda x: colours.blend(0.0, x, 1.4),
                   lambda x: ImageEnhance.Brightness(x).enhance(1.4), 1),
}


@pytest.mark.parametrize("name", PILLOW)
def test_colour_operation_is_pillows(name):
  ours, pillow, levels = PILLOW[name]
  image = photo(seed=3) // 2 + 40  # neither black nor white, so that autocontrast has work
  want = np.asarray(pillow(Image.fromarray(image))) / 255
  assert np.abs(want - image / 255).max() > 4 * LEVEL
  np.testing.assert_allclose(ours(to_float(image)), want, atol=levels * LEVEL)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_gaussian_blur_is_numpys(sigma):
  image = photo(20, 24)
  padded = np.pad(image / 255, ((9, 9), (9, 9), (0, 0)), "edge")
  kernel = np.exp(-np.arange(-9, 10) ** 2 / (2 * sigma**2))
  for axis in (0, 1):
    padded = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "same")
  got = colours.gaussian_blur(to_float(image), sigma)  # ours is cut at 3 sigma: 0.3% of the mass
  np.testing.assert_allclose(got, padded[9:-9, 9:-9], atol=0.5 * LEVEL)
  pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
  # Pillow approximates by three boxes, and worse so within a radius of the border.
  np.testing.assert_allclose(got[6:-6, 6:-6], pillow[6:-6, 6:-6] / 255, atol=3 * LEVEL)


def test_jitter_draws_each_factor_from_its_range_in_any_order():
  image = to_float(photo(8, 8) // 2 + 20)
  keys = jax.random.split(jax.random.key(0), 300)
  jitter = jax.jit(jax.vmap(colours.random_jitter, (0, None, None)), static_argnums=2)
  ratio = np.asarray(jitter(keys, image, (0.4, 0.0, 0.0, 0.0))) / np.asarray(image)
  np.testing.assert_allclose(ratio, ratio[:, :1, :1, :1] * np.ones_like(ratio), rtol=1e-5)
  assert 0.6 <= ratio.min() < 0.62 and 1.38 < ratio.max() <= 1.4001
  # Hue alone keeps HSV's saturation and value, and turns as colorsys does.
  turned = np.asarray(jitter(keys, image, (0.0, 0.0, 0.0, 0.1)))[:, 0, 0]
  hsv = np.array([colorsys.rgb_to_hsv(*map(float, pixel)) for pixel in turned])
  start = np.array(colorsys.rgb_to_hsv(*map(float, image[0, 0])))
  np.testing.assert_allclose(hsv[:, 1:], np.broadcast_to(start[1:], (300, 2)), atol=1e-4)
  turn = (hsv[:, 0] - start[0] + 0.5) % 1 - 0.5
  assert -0.1001 <= turn.min() < -0.09 and 0.09 < turn.max() <= 0.1001
  # Pixels 0 and 1, contrast below 1 (so 0 rises), brightness above 1: applied first, the brightness
  # is lost in clipping and the sum stays 1; applied last it lifts the sum. A quarter of draws each.
  pixels = jnp.array([0.0, 1.0]).reshape(1, 2, 1)
  out = np.asarray(jitter(keys, pixels, (0.5, 0.5, 0.0, 0.0)))[:, 0, :, 0]
  total = out[out[:, 0] > 1e-4].sum(1)
  assert 0.12 < (np.abs(total - 1) < 1e-5).mean() < 0.38 and 0.12 < (total > 1.0001).mean() < 0.38


def numpy_jitter(image, factors, kinds):
  """Brightness, contrast, saturation, hue (0 to 3) in turn, in float64; the hue is colorsys'."""
  for kind in kinds:
    gray = image @ [0.299, 0.587, 0.114]
    if kind == 3:
      hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3).tolist()]
      image = np.reshape([colorsys.hsv_to_rgb((h + factors[3]) % 1, s, v) for h, s, v in hsv],
                         image.shape)
    else:
      mean = [0.0, gray.mean(), gray[..., None]][kind]
      image = np.clip(factors[kind] * image + (1 - factors[kind]) * mean, 0, 1)
  return image


def test_jitter_in_every_order_is_numpys():
  image, factors = photo(6, 5, seed=2) / 255, [1.4, 1.6, 1.8, 0.2]
  orders = [*itertools.product(itertools.permutations(range(3)), range(4))]
  want = [numpy_jitter(image, factors, [*order[:slot], 3, *order[slot:]]) for order, slot in orders]
  assert np.abs(want[0] - np.stack(want[1:])).max((1, 2, 3)).min() > LEVEL  # the order matters
  jitter = jax.jit(jax.vmap(colours.color_jitter, (None, None, 0, 0)))
  got = jitter(jnp.float32(image), jnp.float32(factors), *map(jnp.array, zip(*orders)))
  np.testing.assert_allclose(got, want, atol=1e-5)
  got = colours.color_jitter(jnp.float32(image), jnp.float32(factors), jnp.array([2, 0]))
  np.testing.assert_allclose(got, numpy_jitter(image, factors, [2, 0]), atol=1e-5)


def test_jitter_draws_every_order_alike(monkeypatch):
  monkeypatch.setattr(colours, "color_jitter", lambda image, *drawn: drawn)
  draw = jax.vmap(lambda key: colours.random_jitter(key, jnp.ones((2, 2, 3)), (0.4, 2, 0.2, 0.1)))
  factors, order, slot = map(np.asarray, draw(jax.random.split(jax.random.key(0), 2400)))
  _, counts = np.unique(np.column_stack([order, slot]), axis=0, return_counts=True)
  assert len(counts) == 24 and 56 < counts.min() <= counts.max() < 144  # 100 +- 4.5 deviations
  np.testing.assert_allclose(factors.min(0), [0.6, 0, 0.8, -0.1], atol=0.01)
  np.testing.assert_allclose(factors.max(0), [1.4, 3, 1.2, 0.1], atol=0.01)
  np.testing.assert_allclose(np.corrcoef(factors.T), np.eye(4), atol=0.1)


def test_one_of_three_draws_all_three_equally():
  image = photo(16, 16)
  out = np.asarray(jax.vmap(colours.one_of_three, (0, None))(
      jax.random.split(jax.random.key(0), 300), to_float(image)))
  gray = np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB")) / 255
  solar = np.asarray(ImageOps.solarize(Image.fromarray(image))) / 255
  is_gray = np.abs(out - gray).max((1, 2, 3)) < 1.01 * LEVEL
  is_solar = np.abs(out - solar).max((1, 2, 3)) < 0.01 * LEVEL
  assert not (is_gray & is_solar).any()
  assert 70 < is_gray.sum() < 130 and 70 < is_solar.sum() < 130  # 100 +- 3.7 standard deviations
  blurred = out[~is_gray & ~is_solar]
  np.testing.assert_allclose(blurred.mean((1, 2)), np.broadcast_to(
      image.mean((0, 1)) / 255, (len(blurred), 3)), atol=0.03)
  assert np.abs(blurred - image / 255).max((1, 2, 3)).std() > 0.02  # by different amounts


def test_random_erase_replaces_a_box_by_noise():
  image = jnp.full((32, 32, 1), 9.0)
  keys = jax.random.split(jax.random.key(0), 200)
  out = np.asarray(jax.vmap(erasing.random_erase, (0, None, None))(keys, image, 0.5))[..., 0]
  erased = [np.argwhere(one != 9) for one in out if (one != 9).any()]
  assert 70 < len(erased) < 130
  for place in erased:
    sides = place.max(0) - place.min(0) + 1
    assert np.prod(sides) == len(place) and 0.015 < len(place) / 1024 < 0.35
  noise = out[out != 9]
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def erased_boxes(out):
  """(height, width) of the one box of each image [n, h, w] that is no longer 9; (0, 0) for none."""
  for one in out:
    place = np.argwhere(one != 9)
    sides = np.ptp(place, 0) + 1 if len(place) else np.zeros(2, int)
    assert np.prod(sides) == len(place)
    yield tuple(sides.tolist())


@pytest.mark.parametrize("h, w", [(20, 24), (40, 6)])
def test_random_erase_has_timms_law(h, w):
  n = 20_000
  erase = jax.jit(jax.vmap(erasing.random_erase, (0, None, None)))
  out = erase(jax.random.split(jax.random.key(5), n), jnp.full((h, w, 1), 9.0), 1.0)
  got = collections.Counter(erased_boxes(np.asarray(out)[..., 0]))
  rng, want = np.random.default_rng(0), collections.Counter()
  for _ in range(n):  # timm/data/random_erasing.py
    box = (0, 0)
    for _ in range(10):
      area, aspect = rng.uniform(0.02, 1 / 3) * h * w, np.exp(rng.uniform(*np.log([0.3, 1 / 0.3])))
      tried = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
      if tried[0] < h and tried[1] < w:
        box = tried
        break
    want[box] += 1
  assert max(side for side, _ in got) < h and max(side for _, side in got) < w
  for box in {*got, *want}:  # the difference of two counts of n draws: 5 standard deviations
    assert abs(got[box] - want[box]) < 5 * np.sqrt(2 * max(got[box], want[box])) + 5, box
  for axis in (1, 2):  # each place where a box fits is as likely as another, the last one too
    changed = (np.asarray(out)[..., 0] != 9).any(3 - axis)
    first, last = changed.argmax(1), changed.shape[1] - 1 - changed[:, ::-1].argmax(1)
    assert ((first == 0) & changed.any(1)).sum() > 50 and (last == changed.shape[1] - 1).sum() > 50


def mixed(key, mixup, cutmix, prob=1.0, n=6, **grouping):
  """Images that are constant i + 1, so that a pixel names its source."""
  image = jnp.broadcast_to(jnp.arange(1.0, n + 1).reshape(n, 1, 1, 1), (n, 16, 20, 1))
  batch = {"image": image, "label": jnp.arange(n), "text": jnp.ones(n)}
  out = mixing.mix(key, batch, mixup, cutmix, prob, **grouping)
  return {name: np.asarray(value) for name, value in out.items()}


@pytest.mark.parametrize("partner, of_four", [("mirror", [3, 2, 1, 0]), ("previous", [3, 0, 1, 2])])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_draws_for_each_group_and_stays_in_it(mixup, cutmix, partner, of_four):
  other = np.array(of_four * 3) + np.repeat([0, 4, 8], 4)
  weights = []
  for key in jax.random.split(jax.random.key(2), 80):
    out = mixed(key, mixup, cutmix, n=12, size=4, partner=partner)
    np.testing.assert_array_equal(out["label_mix"], other)
    groups = out["mix"].reshape(3, 4)
    np.testing.assert_array_equal(groups, groups[:, :1] * np.ones((1, 4)))
    weights.append(groups[:, 0])
    np.testing.assert_allclose(out["image"].mean((1, 2, 3)), out["mix"] * np.arange(1, 13)
                               + (1 - out["mix"]) * (other + 1), rtol=1e-5)
    # The share of the partner in each pixel is the group's, whichever pixel of it names the source.
    share = (out["image"][..., 0] - np.arange(1, 13).reshape(12, 1, 1)) / (
        other - np.arange(12)).reshape(12, 1, 1)
    share = share.reshape(3, 4, 16, 20)
    np.testing.assert_allclose(share, share[:, :1] * np.ones((1, 4, 1, 1)), atol=1e-5)
    assert np.abs(share).max() < 1.001 and share.min() > -0.001
  weights = np.array(weights)
  assert (np.diff(weights, axis=1) != 0).mean() > 0.9 and len(np.unique(weights)) > 50
  apart = np.corrcoef(weights.T) - np.eye(3)
  assert np.abs(apart).max() < 0.4  # 3.6 standard deviations of 80 independent draws


def test_mix_groups_have_the_published_law():
  def weights(mixup, cutmix, partner="mirror"):
    out = jax.vmap(lambda key: mixing.mix(
        key, {"image": jnp.ones((40, 16, 20, 1)), "label": jnp.arange(40)}, mixup, cutmix, size=2,
        partner=partner)["mix"][::2])(jax.random.split(jax.random.key(0), 200))
    return np.asarray(out).ravel()

  rng, levels, n = np.random.default_rng(0), [0.05, 0.25, 0.5, 0.75, 0.95], 4000
  lam = rng.beta(0.8, 0.8, n)
  np.testing.assert_allclose(np.quantile(weights(0.8, 0.0), levels), np.quantile(lam, levels),
                             atol=0.05)
  lam = rng.beta(0.5, 0.5, n)  # AugReg's
  np.testing.assert_allclose(np.quantile(weights(0.5, 0.0, "previous"), levels),
                             np.quantile(np.maximum(lam, 1 - lam), levels), atol=0.04)
  want = []
  for cut in np.sqrt(1 - rng.beta(1, 1, n)):  # rand_bbox of timm 0.3.2, with corrected lambda
    area = 1
    for side in (16, 20):
      centre, half = rng.integers(side), int(side * cut) // 2
      area *= np.clip(centre + half, 0, side) - np.clip(centre - half, 0, side)
    want.append(1 - area / 320)
  got = weights(0.0, 1.0)
  assert {*np.round(got * 320)} <= {*np.round(np.arange(321.0))}
  np.testing.assert_allclose(np.quantile(got, levels), np.quantile(want, levels), atol=0.05)


def test_mix_size_divides_the_batch():
  section = dict(image_size=8, mixup=0.8, mix_size=3)
  with pytest.raises(ValueError, match=r"augment\.mix_size = 3: must be None.*its 16 examples"):
    recipes.make_augment(ConfigDict(dict(augment=section, data=dict(batch_size=16))))
  recipes.make_augment(ConfigDict(dict(augment=section, data=dict(batch_size=15))))
  recipes.make_augment(ConfigDict(dict(augment=section | dict(mixup=0.0),
                                       data=dict(batch_size=16))))
  with pytest.raises(ValueError, match=r"augment\.mix_size = 3.*its 4 examples"):
    augment.make(**section).train(jax.random.key(0), batch_of(4, 8, 8))


@pytest.mark.parametrize("partner", suite(augment.PARTNERS, 0))
def test_groups_on_one_device_are_mixed_there(partner):
  sharding = jax.sharding.NamedSharding(
      jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
      jax.sharding.PartitionSpec("data"))
  batch = jax.device_put(batch_of(32, 8, 8), sharding)
  moved = []
  # Images and labels do not cross; the samplers' loops ask all devices for one bit: are we done?
  crossing = r"\[\d.*(all-gather|all-to-all|all-reduce|collective-permute)(-start)?\("
  for size in (2, 4, None):
    train = jax.jit(augment.make(image_size=8, mixup=0.8, cutmix=1.0, mix_size=size,
                                 mix_partner=partner).train)
    text = train.lower(jax.random.key(0), batch).compile().as_text()
    moved.append(re.search(crossing, text) is not None)
  assert moved == [False, False, True]


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_weight_is_the_share_of_the_own_image(mixup, cutmix):
  weights, boxes = [], 0
  for key in jax.random.split(jax.random.key(0), 60):
    out = mixed(key, mixup, cutmix)
    np.testing.assert_array_equal(out["label"], np.arange(6))
    np.testing.assert_array_equal(out["label_mix"], np.arange(6)[::-1])
    own, other = np.arange(1, 7), np.arange(6, 0, -1)
    np.testing.assert_allclose(out["image"].mean((1, 2, 3)),
                               out["mix"] * own + (1 - out["mix"]) * other, rtol=1e-5)
    pasted = out["image"][0, :, :, 0] == 6
    is_box = set(np.unique(out["image"][0])) <= {1, 6}
    if is_box and pasted.any():
      rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
      assert pasted.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    boxes += is_box
    weights.append(out["mix"][0])
  assert boxes == 0 if not cutmix else boxes == 60 if not mixup else 15 < boxes < 45
  if not cutmix:  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); 60 draws
    assert abs(np.mean(weights) - 0.5) < 0.15
    assert abs(np.var(weights) - 1 / (4 * 2.6)) < 0.04


def test_mix_prob_leaves_batches_alone():
  weights = [mixed(key, 0.8, 0.0, 0.3)["mix"][0] for key in jax.random.split(jax.random.key(1), 60)]
  assert 30 < np.sum(np.array(weights) == 1.0) < 54  # 42 +- 3.4 standard deviations


PLAIN = dict(mean=0.0, std=1.0)


@pytest.mark.parametrize("options, pillow", [
    (dict(grayscale=0.3), lambda x: ImageOps.grayscale(x).convert("RGB")),
    (dict(solarize=0.3), ImageOps.solarize),
    (dict(blur=0.3), None),
    (dict(color_jitter=(0.0, 0.4, 0.0, 0.0), jitter_prob=0.3), None)])
def test_an_operation_comes_with_its_probability(options, pillow):
  image = photo(8, 8, seed=7)
  train = jax.jit(augment.make(image_size=8, **PLAIN, **options).train)
  out = np.asarray(train(jax.random.key(0), {"image": np.repeat(image[None], 400, 0)})["image"])
  changed = np.abs(out - image / 255).max((1, 2, 3)) > 1e-4
  assert 79 < changed.sum() < 161  # 120 +- 4.5 standard deviations
  np.testing.assert_allclose(out[~changed], np.repeat(image[None] / 255, 400 - changed.sum(), 0),
                             atol=1e-6 if pillow else 1e-4)  # the least of blurs changes little
  if pillow:
    want = np.asarray(pillow(Image.fromarray(image))) / 255
    np.testing.assert_allclose(out[changed], np.repeat(want[None], changed.sum(), 0), atol=LEVEL)


def test_operations_are_drawn_independently():
  image = photo(8, 8, seed=7)
  train = jax.jit(augment.make(
      image_size=8, grayscale=0.5, solarize=0.5, flip=True, **PLAIN).train)
  out = train(jax.random.key(0), {"image": np.repeat(image[None], 400, 0)})["image"]
  want = []
  for gray, solar, flip in itertools.product((False, True), repeat=3):
    one = Image.fromarray(image)
    one = ImageOps.grayscale(one).convert("RGB") if gray else one
    one = ImageOps.solarize(one) if solar else one
    want.append(np.asarray(ImageOps.mirror(one) if flip else one) / 255)
  matches = np.abs(out[:, None] - np.stack(want)[None]).max((2, 3, 4)) < 1.01 * LEVEL
  assert (matches.sum(1) == 1).all()
  assert 20 < matches.sum(0).min() <= matches.sum(0).max() < 80  # 50 +- 4.5 standard deviations


def test_what_has_probability_zero_is_not_traced():
  batch, key = batch_of(2, 8, 8), jax.random.key(0)
  off = dict(color_jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.0, grayscale=0.0, blur=0.0,
             solarize=0.0)
  plain, with_off, with_blur = (
      str(jax.make_jaxpr(augment.make(image_size=8, **options).train)(key, batch))
      for options in ({}, off, dict(blur=0.1)))
  assert plain == with_off != with_blur


def test_blur_draws_sigma_uniformly():
  point = np.zeros((13, 13, 1), np.float32)
  point[6, 6] = 1
  peak = jax.vmap(colours.random_blur, (0, None))(
      jax.random.split(jax.random.key(0), 1000), jnp.asarray(point))[:, 6, 6, 0]
  sigma = np.linspace(0.1, 2.0, 1000)
  heights = 1 / np.exp(-np.arange(-9, 10)[:, None] ** 2 / (2 * sigma**2)).sum(0) ** 2
  drawn = np.interp(-np.asarray(peak), -heights, sigma)
  # 1,000 draws: the standard error of these quantiles is at most 0.03.
  np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75, 1]), [0.575, 1.05, 1.525, 2],
                             atol=0.12)


@pytest.mark.parametrize("flat, on, more", suite([
    (False, dict(color_jitter=(0.2, 0.0, 0.0, 0.0), blur=0.5),
     [dict(grayscale=0.5, solarize=0.5), dict(grayscale=1.0, grayscale_first=True)]),
    (False, dict(blur=0.5), [dict(color_jitter=(0.0, 0.0, 0.0, 0.5), jitter_prob=0.5)]),
    (True, dict(color_jitter=(0.2, 0.0, 0.0, 0.0), jitter_prob=0.5), [dict(blur=0.5)])],
    2, unpack=True))
def test_operations_that_are_off_leave_the_others_draws(flat, on, more):
  """On dark gray images some operations change nothing, unless by moving another's draws."""
  image = np.full((8, 8, 1), 60, np.uint8) if flat else photo(8, 8, 1) // 3
  batch = {"image": np.broadcast_to(image, (16, 8, 8, 3))}
  on = dict(image_size=8, flip=True, **PLAIN) | on
  want = jax.jit(augment.make(**on).train)(jax.random.key(0), batch)["image"]
  assert np.asarray(want).std(0).max() > 0.01
  for options in more:
    got = jax.jit(augment.make(**on | options).train)(jax.random.key(0), batch)["image"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_grayscale_first_leaves_no_hue_to_turn():
  image = photo(8, 8, seed=4)
  gray = np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB")) / 255
  options = dict(image_size=8, grayscale=1.0, color_jitter=(0.0, 0.0, 0.0, 0.5), **PLAIN)
  first, last = (np.asarray(augment.make(grayscale_first=first, **options).train(
      jax.random.key(0), {"image": np.repeat(image[None], 8, 0)})["image"]) for first in (1, 0))
  np.testing.assert_allclose(first, np.repeat(gray[None], 8, 0), atol=LEVEL)
  assert np.abs(last - gray).max() > 0.1 and np.ptp(last, -1).max() < 1e-6


EVERYTHING = dict(
    image_size=(20, 16), affine=dict(degrees=10, translate=0.1, scale=(0.9, 1.1), shear=5),
    crop_area=(0.3, 1.0), flip=True, three_augment=True, color_jitter=(0.3, 0.3, 0.3, 0.1),
    jitter_prob=0.8, grayscale=0.2, blur=0.5, solarize=0.2, randaugment=(2, 9), erase=0.5,
    mixup=0.2, cutmix=1.0)
TWO_VIEWS = dict(
    image_size=(20, 16), affine=dict(degrees=10, translate=0.1), interpolation="linear",
    color_jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, grayscale=0.2, blur=1.0, flip=True,
    second_view=dict(blur=0.1, solarize=0.2))


def test_everything_at_once_on_four_channels():
  out = jax.jit(augment.make(**EVERYTHING).train)(jax.random.key(0), batch_of(4, 20, 16, 4))
  chex.assert_shape(out["image"], (4, 20, 16, 4))
  chex.assert_type(out["image"], jnp.float32)
  chex.assert_tree_all_finite(out["image"])
  assert np.asarray(out["image"]).std((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("options, channels, share", [
  (TWO_VIEWS, 3, 0), pytest.param(EVERYTHING, 1, 0.01, marks=pytest.mark.slow)])
def test_eight_devices_as_one_in_one_trace(options, channels, share):
  batch = batch_of(16, 20, 16, channels)
  sharding = jax.sharding.NamedSharding(
      jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
      jax.sharding.PartitionSpec("data"))
  recipe = augment.make(**options)
  chex.clear_trace_counter()  # it counts by name: another recipe's `train` is the same to it
  train = jax.jit(chex.assert_max_traces(recipe.train, 2))  # one a sharding
  for seed in (0, 1, 2):
    one = train(jax.random.key(seed), jax.device_put(batch, jax.devices()[0]))
    eight = train(jax.random.key(seed), jax.device_put(batch, sharding))
    # Sums in another order differ by 1e-6; where it quantises, a pixel may so fall one level apart.
    for name in {"image", "image_2"} & {*one}:
      apart = np.abs(np.asarray(one.pop(name)) - np.asarray(eight[name]))
      assert np.isfinite(apart).all() and np.asarray(eight[name]).std((1, 2, 3)).min() > 0.05
      assert (apart > 5e-6).mean() <= share and apart.max() < 0.1
    chex.assert_trees_all_close(one, {name: eight[name] for name in one}, atol=1e-6)
  assert eight["image"].sharding.num_devices == 8


@pytest.mark.parametrize("options", suite([
    EVERYTHING | dict(mixup=0.0, cutmix=0.0), TWO_VIEWS,
    EVERYTHING | dict(mixup=0.0, cutmix=0.0, randaugment="rand-m9-mstd0.5-inc1")], 1))
def test_an_example_depends_on_its_place_and_key_only(options):
  batch = batch_of(16, 20, 16)
  train = jax.jit(augment.make(**options).train)
  first = train(jax.random.key(0), batch)
  swapped = {**batch, "image": np.concatenate([batch["image"][:1], batch["image"][:0:-1]])}
  other, again = train(jax.random.key(0), swapped), train(jax.random.key(1), batch)
  for name in ("image", "image_2") if "second_view" in options else ("image",):
    chex.assert_shape(first[name], (16, 20, 16, 3))
    chex.assert_trees_all_close(first[name][::8], other[name][::8], atol=1e-6)
    assert np.abs(first[name] - again[name]).max((1, 2, 3)).min() > 0.1
  if "second_view" in options:
    assert np.abs(first["image"] - first["image_2"]).max((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("section", [dict, ConfigDict])
def test_the_second_view_differs_in_its_fields_alone(section):
  batch = batch_of(3)
  raw = batch["image"] / 255
  solar = np.stack([ImageOps.solarize(Image.fromarray(image)) for image in batch["image"]]) / 255
  recipe = augment.make(image_size=24, **PLAIN, second_view=section({"solarize": 1.0}))
  out = recipe.train(jax.random.key(0), batch)
  np.testing.assert_allclose(out["image"], raw, atol=1e-6)
  np.testing.assert_allclose(out["image_2"], solar, atol=1e-6)
  assert {*out} == {"image", "image_2", "label"}
  recipe = augment.make(image_size=24, **PLAIN, solarize=1.0, second_view=section({"std": 2.0}))
  out = recipe.train(jax.random.key(0), batch)
  np.testing.assert_allclose(out["image"], solar, atol=1e-6)
  np.testing.assert_allclose(out["image_2"], solar / 2, atol=1e-6)
  out = recipe.eval(batch)
  np.testing.assert_allclose(out["image"], raw, atol=1e-6)
  assert {*out} == {"image", "label"}


def test_flip_mirrors_half_and_nothing_else():
  batch = {"image": np.repeat(photo(8, 8)[None], 200, 0)}
  out = augment.make(image_size=8, mean=0.0, std=1.0, flip=True).train(jax.random.key(0), batch)
  same = np.abs(out["image"] - batch["image"] / 255).max((1, 2, 3)) < 1e-6
  mirrored = np.abs(out["image"] - batch["image"][:, :, ::-1] / 255).max((1, 2, 3)) < 1e-6
  assert (same ^ mirrored).all() and 65 < same.sum() < 135


def test_images_that_are_cut_are_only_normalised():
  batch, recipe = batch_of(3), augment.make(image_size=24, crop_area=(0.2, 1.0))
  for out in (recipe.train(jax.random.key(0), batch), recipe.eval(batch)):
    np.testing.assert_allclose(out["image"], batch["image"] / 127.5 - 1, atol=1e-6)
  with pytest.raises(ValueError, match=r"\(24, 20\), not cut to augment\.image_size = \(24, 24\)"):
    recipe.train(jax.random.key(0), batch_of(2, 24, 20))


def test_two_cuts_become_the_two_views():
  batch, recipe = batch_of(3), augment.make(image_size=24, second_view={})
  batch["image_2"] = batch["image"][::-1].copy()
  out = recipe.train(jax.random.key(0), batch)
  for name in ("image", "image_2"):
    np.testing.assert_allclose(out[name], batch[name] / 127.5 - 1, atol=1e-6)
  kept = recipe.eval(batch)["image_2"]
  chex.assert_trees_all_equal(kept, batch["image_2"])


def test_the_config_section_is_checked():
  section = dict(image_size=8, blur=0.5, second_view={})
  assert fields.arguments(augment.make, ConfigDict(section), "augment") == section
  with pytest.raises(ValueError, match=r"config\.augment\.flipp.*did you mean 'flip'"):
    fields.arguments(augment.make, dict(flipp=True), "augment")


@pytest.mark.parametrize("wrong, message", [
    (dict(image_size=0), r"augment\.image_size = 0"),
    (dict(image_size=(3, 4, 5)), r"augment\.image_size"),
    (dict(std=(0.5, 0.0)), r"augment\.std"),
    (dict(crop_area=(0.0, 1.0)), r"augment\.crop_area = \(0\.0, 1\.0\).*0 < low"),
    (dict(crop_area=0.5), r"augment\.crop_area = 0\.5"),
    (dict(crop_area=(0.1, 1), crop_padding=4), r"augment\.crop_area.*only one"),
    (dict(crop_padding=4, train_crop="random"), r"augment\.crop_area.*only one"),
    (dict(train_crop="center"), r"augment\.train_crop = 'center'.*did you mean 'centre'"),
    (dict(eval_crop=0.0), r"augment\.eval_crop = 0\.0: must be a share in \(0, 1\]"),
    (dict(train_crop="squish"), r"augment\.train_crop = 'squish'.*did you mean 'squash'"),
    (dict(eval_squash=2), r"augment\.eval_squash = 2: must be True or False"),
    (dict(second_view=dict(crop_area=2)), r"augment\.second_view\.crop_area = 2"),
    (dict(crop_ratio=(2, 1)), r"augment\.crop_ratio"),
    (dict(crop_padding=-1), r"augment\.crop_padding = -1"),
    (dict(interpolation="bicubik"), r"augment\.interpolation = 'bicubik'.*did you mean 'bicubic'"),
    (dict(affine=dict(degree=3)), r"augment\.affine = 'degree'.*did you mean 'degrees'"),
    (dict(affine=dict(scale=(0, 1))), r"augment\.affine\.scale"),
    (dict(color_jitter=(1, 1, 1, 0.6)), r"augment\.color_jitter"),
    (dict(randaugment=(0, 9)), r"augment\.randaugment = \(0, 9\)"),
    (dict(randaugment=9), r"augment\.randaugment = 9: must be None, \(layers >= 1"),
    (dict(randaugment="rand-m9-x2"), r"augment\.randaugment = 'rand-m9-x2': must be timm's 'rand'"),
    (dict(randaugment="augmix-m9"), r"augment\.randaugment = 'augmix-m9'"),
    (dict(randaugment="rand-m11"), r"augment\.randaugment.*whole, in \[0, 10\]"),
    (dict(randaugment="rand-m9.5"), r"augment\.randaugment.*whole, in \[0, 10\]"),
    (dict(randaugment="rand-n0"), r"augment\.randaugment.*n \(layers, at least 1\)"),
    (dict(randaugment="rand-p1.5"), r"augment\.randaugment.*p \(in \[0, 1\]\)"),
    (dict(randaugment="rand-m9-inc2"), r"augment\.randaugment.*inc \(0 or 1\)"),
    (dict(randaugment="rand-m9", interpolation="lanczos3"), r"augment\.interpolation = 'lanczos3'"),
    (dict(mix_size=0), r"augment\.mix_size = 0: must be None or an int > 0"),
    (dict(mix_size=2.0), r"augment\.mix_size = 2\.0"),
    (dict(mix_partner="mirrored"), r"augment\.mix_partner.*did you mean 'mirror'"),
    (dict(randaugment=(2, 31)), r"augment\.randaugment"),
    (dict(interpolation="nearest"), r"augment\.interpolation = 'nearest'.*'linear'"),
    (dict(jitter_prob=-0.1), r"augment\.jitter_prob = -0\.1"),
    (dict(grayscale=2), r"augment\.grayscale = 2: must be in \[0, 1\]"),
    (dict(blur=1.1), r"augment\.blur = 1\.1"),
    (dict(solarize=-1), r"augment\.solarize = -1"),
    (dict(second_view=True), r"augment\.second_view = True: must be None or a dict"),
    (dict(second_view=dict(blurr=1.0)), r"augment\.second_view\.blurr: .*did you mean 'blur'"),
    (dict(second_view=dict(blur=2.0)), r"augment\.second_view\.blur = 2\.0"),
    (dict(second_view=dict(eval_crop=0.9)), r"second_view\.eval_crop: two views differ in no such"),
    (dict(second_view=dict(mixup=1.0)), r"augment\.second_view\.mixup"),
    (dict(second_view={}, mixup=0.2), r"augment\.mixup = 0\.2: must be 0 with a second_view"),
    (dict(second_view={}, cutmix=1.0), r"augment\.cutmix = 1\.0"),
    (dict(erase=1.5), r"augment\.erase = 1\.5"),
    (dict(mixup=-0.1), r"augment\.mixup = -0\.1"),
])
def test_wrong_values_are_named(wrong, message):
  with pytest.raises(ValueError, match=message):
    augment.make(**{"image_size": 8} | wrong)


@pytest.mark.parametrize("options, batch, message", [
    (dict(mixup=0.5), {"image": np.zeros((2, 8, 8, 1), np.uint8)}, r"augment\.mixup.*labels"),
    (dict(mean=(0, 0)), {"image": np.zeros((2, 8, 8, 3), np.uint8)}, r"augment\.mean.*3 channels"),
    (dict(), {"image": np.zeros((2, 8, 8, 3), np.float32)}, "uint8, not float32"),
])
def test_wrong_batches_are_named(options, batch, message):
  with pytest.raises(ValueError, match=message):
    augment.make(image_size=8, **options).train(jax.random.key(0), batch)
