"""Augmentation on the device: uint8 batches in, normalised float32 batches out, all under jit.

Primitives take one image, float32 [h, w, c] in [0, 1]; `make` vmaps them over per-example keys, so
what happens to an example follows from (rng, its place in the batch) and never from the mesh. Any
number of channels works: luma is Rec. 601 for 3 and the mean otherwise, so grayscale and saturation
leave a 1-channel image as it is; hue turns only 3-channel images.
"""

import difflib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np


class Augment(NamedTuple):
  """A recipe; both functions keep every key of the batch and replace "image"."""
  train: Callable  # (rng, batch) -> batch: uint8 [b, h, w, c] -> float32 [b, H, W, c], normalised
  eval: Callable   # (batch) -> batch: the same shapes, deterministic


def random_box(key, height, width, area, ratio, tries=10):
  """A box as torchvision's RandomResizedCrop samples it: the first of ten tries that fits.

  Args:
    area: (low, high) share of the image, uniform. ratio: (low, high) width / height, log-uniform.
  Returns:
    float32 [4]: top, left, height, width in whole pixels; the largest central box if none fits.
  """
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  target = height * width * jax.random.uniform(area_key, (tries,), minval=area[0], maxval=area[1])
  aspect = jnp.exp(jax.random.uniform(
      ratio_key, (tries,), minval=math.log(ratio[0]), maxval=math.log(ratio[1])))
  size = jnp.round(jnp.sqrt(jnp.stack([target / aspect, target * aspect], -1)))  # tries 2
  limit = jnp.array([[height, width]], jnp.float32)
  fits = jnp.all((size > 0) & (size <= limit), -1)
  size = size[jnp.argmax(fits)]
  place = jnp.floor(jax.random.uniform(place_key, (2,)) * (limit[0] - size + 1))
  central = min(max(width / height, ratio[0]), ratio[1])
  h, w = min(height, round(width / central)), min(width, round(height * central))
  fallback = jnp.array([(height - h) // 2, (width - w) // 2, h, w], jnp.float32)
  return jnp.where(fits.any(), jnp.concatenate([place, size]), fallback)


def crop_resize(image, box, size, method="bicubic"):
  """Resamples `box` (top, left, height, width; pixels, may be fractions) to `size`, antialiased."""
  box = jnp.asarray(box, jnp.float32)
  scale = jnp.array(size, jnp.float32) / box[2:]
  image = jax.image.scale_and_translate(
      image, (*size, image.shape[-1]), (0, 1), scale, -box[:2] * scale, method)
  return jnp.clip(image, 0, 1)  # cubic and Lanczos overshoot


def centre_resize(image, size, method="bicubic"):
  """Resizes to cover `size` (short side first) and cuts the centre, in one resample."""
  (h, w), (H, W) = image.shape[:2], size
  if (h, w) == (H, W):
    return image
  scale = max(H / h, W / w)
  box = ((h - H / scale) / 2, (w - W / scale) / 2, H / scale, W / scale)
  return crop_resize(image, box, size, method)


def padded_crop(key, image, size, padding, method="bicubic"):
  """Short side to size, pad by reflection, cut at random: DeiT III's SRC (2204.07118, sec. 3.3)."""
  (h, w), (H, W) = image.shape[:2], size
  scale = max(H / h, W / w)
  image = centre_resize(image, (round(h * scale), round(w * scale)), method)
  image = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
  top, left = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]) - jnp.array(size) + 1)
  return jax.lax.dynamic_slice(image, (top, left, 0), (H, W, image.shape[-1]))


def affine_matrix(angle, shear_x, shear_y, move_x, move_y, scale=1.0):
  """Rotation (radians) @ shear (slopes) / scale, then a move (pixels): [3, 3].

  It maps an output place (x, y, 1), counted from the image's centre, to the input place seen there.
  """
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.array([[(c - s * shear_y) / scale, (c * shear_x - s) / scale, move_x],
                    [(s + c * shear_y) / scale, (s * shear_x + c) / scale, move_y],
                    [0, 0, 1]])


def warp(image, matrix, fill=None):
  """Samples `image` bilinearly at `matrix` @ place; outside is `fill`, or the nearest edge."""
  h, w, _ = image.shape
  centre = np.array([(w - 1) / 2, (h - 1) / 2, 0], np.float32).reshape(3, 1, 1)
  y, x = np.mgrid[:h, :w].astype(np.float32)
  grid = np.stack([x, y, np.ones_like(x)]) - centre  # xy1 h w
  # The accelerators' default precision would misplace pixels by up to half of one.
  x, y, _ = jnp.einsum("ij,jhw->ihw", matrix, grid, precision="highest") + centre
  sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=1,
                             mode="nearest" if fill is None else "constant")
  offset = 0.0 if fill is None else fill  # the constant of "constant" is 0
  return jax.vmap(sample, -1, -1)(image - offset) + offset


def random_affine(key, image, *, degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0):
  """One random affine resample; the edge fills what comes into view.

  Args:
    degrees: rotation, uniform in +-degrees. translate: shift, +-share of the side, per axis.
    scale: (low, high) factor, uniform. shear: of x along y, uniform in +-shear degrees.
  """
  h, w, _ = image.shape
  u = jax.random.uniform(key, (5,), minval=-1, maxval=1)
  return warp(image, affine_matrix(
      u[0] * math.radians(degrees), jnp.tan(u[1] * math.radians(shear)), 0.0, u[2] * translate * w,
      u[3] * translate * h, scale[0] + (scale[1] - scale[0]) * (u[4] + 1) / 2))


def blend(degenerate, image, factor):
  """Pillow's ImageEnhance: 0 gives `degenerate`, 1 the image, above 1 exaggerates; clipped."""
  return jnp.clip(degenerate + factor * (image - degenerate), 0, 1)


def grayscale(image):
  """Luma in every channel."""
  if image.shape[-1] == 3:
    return pix.rgb_to_grayscale(image, keep_dims=True)
  return jnp.broadcast_to(image.mean(-1, keepdims=True), image.shape)


def random_jitter(key, image, strengths):
  """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter.

  Args:
    strengths: four numbers s in that order. Factors are uniform in [max(0, 1 - s), 1 + s], hue's
      turn in [-s, s] with s <= 0.5. An operation whose s is 0 is left out.
  """
  order_key, draw_key = jax.random.split(key)
  s = np.float32(strengths)
  low, high = np.append(np.maximum(0, 1 - s[:3]), -s[3]), np.append(1 + s[:3], s[3])
  b, c, sat, turn = jax.random.uniform(draw_key, (4,), minval=low, maxval=high)
  ops = [lambda x: blend(0.0, x, b), lambda x: blend(grayscale(x).mean(), x, c),
         lambda x: blend(grayscale(x), x, sat),
         lambda x: pix.adjust_hue(x, turn) if x.shape[-1] == 3 else x]
  ops = [op for op, strength in zip(ops, strengths) if strength]
  for index in jax.random.permutation(order_key, len(ops)):
    image = jax.lax.switch(index, ops, image)
  return image


def gaussian_blur(image, sigma, max_sigma=2.0):
  """Blurs by `sigma` pixels, traced or not, at most max_sigma; edges are repeated outwards."""
  radius = math.ceil(3 * max_sigma)
  kernel = jax.nn.softmax(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
  # Shifted sums: in a convolution each image, with a kernel of its own, would be its own group.
  for axis in (0, 1):
    n = image.shape[axis]
    image = jnp.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(3)], "edge")
    image = sum(kernel[k] * jax.lax.slice_in_dim(image, k, k + n, axis=axis)
                for k in range(2 * radius + 1))
  return image


def one_of_three(key, image):
  """DeiT III's 3-Augment (2204.07118, sec. 3.3): grayscale, solarize or blur by 0.1 to 2 pixels."""
  which_key, sigma_key = jax.random.split(key)
  sigma = jax.random.uniform(sigma_key, minval=0.1, maxval=2.0)
  return jax.lax.switch(jax.random.randint(which_key, (), 0, 3), [
      grayscale, lambda x: pix.solarize(x, 127.5 / 255), lambda x: gaussian_blur(x, sigma)], image)


def autocontrast(image):
  """Stretches each channel to [0, 1]; flat channels stay."""
  low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
  return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def equalize(image):
  """Equalises each channel's histogram of 256 levels, with Pillow's integer arithmetic."""
  def channel(plane):
    histogram = jnp.bincount(plane.ravel(), length=256)
    step = (plane.size - histogram[plane.max()]) // 255
    lut = (step // 2 + jnp.cumsum(histogram) - histogram) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(lut, 255)[plane], plane)
  return jax.vmap(channel, -1, -1)(jnp.round(image * 255).astype(jnp.int32)) / 255


def posterize(image, bits):
  """Keeps the upper `bits` of 8."""
  step = 2 ** (8 - bits)
  return jnp.floor(jnp.round(image * 255) / step) * step / 255


def sharpness(image, factor):
  """Blends with Pillow's SMOOTH: 3x3 ones, 5 in the middle, over 13; the border stays."""
  smooth = jax.lax.reduce_window(image, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "VALID")
  smooth = (smooth + 4 * image[1:-1, 1:-1]) / 13
  return blend(image.at[1:-1, 1:-1].set(smooth), image, factor)


def fill_box(image, top, left, height, width, fill):
  """Replaces the box (pixels, clipped at the edge) by `fill`, broadcast against the image."""
  h, w, _ = image.shape
  y, x = np.mgrid[:h, :w] + 0.5
  inside = (y > top) & (y < top + height) & (x > left) & (x < left + width)
  return jnp.where(inside[..., None], fill, image)


def rand_augment(key, image, layers, magnitude, fill):
  """RandAugment (1909.13719): in each of `layers`, one of AugReg's 16 operations, equally likely.

  With level = magnitude / 10 their ranges are AutoAugment's: rotation 30 level degrees, shear 0.3
  level, translation 100 and Cutout's side 80 level pixels at 224, enhancement 0.1 + 1.8 level,
  Posterize keeps 4 level bits, Solarize inverts from 256 level up (these two weaken as it grows).
  Two departures: moves are about the centre, and those of all layers are composed and sampled once,
  bilinearly, after the colours. Under vmap each layer computes every colour operation.

  Args:
    fill: [1, 1, c] or [1, 1, 1], shown where the image was cut out or moved away.
  """
  level, (h, w, _) = magnitude / 10, image.shape
  factor, side = 0.1 + 1.8 * level, round(80 / 224 * level * min(h, w))
  moves = jnp.array([math.radians(30), 0.3, 0.3, 100 / 224 * w, 100 / 224 * h]) * level
  matrix = jnp.eye(3)
  for layer_key in jax.random.split(key, layers):
    op_key, sign_key, place_key = jax.random.split(layer_key, 3)
    top, left = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.array([h, w])) - side // 2
    ops = [
        autocontrast, equalize, lambda x: 1 - x, lambda x: posterize(x, min(8, int(4 * level))),
        lambda x: pix.solarize(x, (int(256 * level) - 0.5) / 255),
        lambda x: jnp.where(x < 127.5 / 255, jnp.clip(x + int(110 * level) / 255, 0, 1), x),
        lambda x: blend(grayscale(x), x, factor), lambda x: blend(grayscale(x).mean(), x, factor),
        lambda x: blend(0.0, x, factor), lambda x: sharpness(x, factor),
        lambda x, t=top, l=left: fill_box(x, t, l, side, side, fill),
        lambda x: x]  # the moves' turn
    op = jax.random.randint(op_key, (), 0, len(ops) - 1 + len(moves))
    # Without the barrier XLA fuses one layer's operations into each of the next: twice slower.
    image = jax.lax.optimization_barrier(
        jax.lax.switch(jnp.minimum(op, len(ops) - 1), ops, image))
    signed = moves * (op == len(ops) - 1 + np.arange(len(moves))) * jax.random.rademacher(sign_key)
    matrix = jnp.matmul(matrix, affine_matrix(*signed), precision="highest")
  return warp(image, matrix, fill)


def random_erase(key, image, prob):
  """Random erasing (1708.04896) as in DeiT: a box of 2-33% of the area turns into N(0, 1) noise."""
  apply_key, box_key, noise_key = jax.random.split(key, 3)
  box = random_box(box_key, *image.shape[:2], (0.02, 1 / 3), (0.3, 1 / 0.3))
  erased = fill_box(image, *box, jax.random.normal(noise_key, image.shape))
  return jnp.where(jax.random.bernoulli(apply_key, prob), erased, image)


def mix(key, batch, mixup, cutmix, prob=1.0):
  """Mixup (1710.09412) or CutMix (1905.04899) of each example with its mirror in the batch (DeiT).

  One draw a batch: lambda ~ Beta(alpha, alpha), and a fair coin between the two where both are on.

  Args:
    batch: "image" float [b, h, w, c] and "label" int [b]. mixup, cutmix: alpha, 0 for off.
  Returns:
    the batch with "label_mix" int [b] and "mix" float32 [b], the weight of the example's own label:
    for CutMix its share of the pixels, once the box is clipped at the edge.
  """
  if "label" not in batch:
    raise ValueError(f"augment.mixup and augment.cutmix need labels, not only {sorted(batch)}")
  apply_key, coin_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 5)
  b, h, w, _ = batch["image"].shape
  own, ones = 1.0, jnp.ones((h, w, 1))
  if mixup:
    own = jax.random.beta(mixup_key, mixup, mixup) * ones
  if cutmix:
    sides = jnp.array([h, w]) * jnp.sqrt(1 - jax.random.beta(cutmix_key, cutmix, cutmix))
    half = jnp.floor(sides) // 2
    corner = jax.random.randint(place_key, (2,), 0, jnp.array([h, w])) - half
    own = jnp.where(jax.random.bernoulli(coin_key) & bool(mixup), own,
                    fill_box(ones, *corner, *(2 * half), 0.0))
  own = jnp.where(jax.random.bernoulli(apply_key, prob), own, ones)
  image = own[None] * batch["image"] + (1 - own[None]) * batch["image"][::-1]
  return {**batch, "image": image, "label_mix": batch["label"][::-1],
          "mix": jnp.full((b,), own.mean())}


def _check(ok, field, value, allowed, names=()):
  if not ok:
    near = difflib.get_close_matches(str(value), names, 1)
    raise ValueError(f"augment.{field} = {value!r}: must be {allowed}"
                     + (f"; did you mean {near[0]!r}?" if near else ""))


def _is_range(value, high=math.inf):
  return np.shape(value) == (2,) and 0 < value[0] <= value[1] <= high


def make(*, image_size, mean=0.5, std=0.5, cropped=False, affine=None, crop_area=None,
         crop_ratio=(3 / 4, 4 / 3), crop_padding=None, interpolation="bicubic", flip=False,
         three_augment=False, color_jitter=None, randaugment=None, erase=0.0, mixup=0.0, cutmix=0.0,
         mix_prob=1.0) -> Augment:
  """The recipe of `config.augment`; operations run in the order of the keywords from `affine` on.

  Args:
    image_size: pixels, int or (height, width). With no crop on, images of another size are resized
      to cover it and cut at the centre, as in `eval`.
    mean, std: of pixels in [0, 1], a float or one a channel: (x - mean) / std.
    cropped: True if the host cropped and resized: training images must then have image_size.
    affine: dict of `random_affine`'s keywords, or None.
    crop_area: (low, high) share of the image in (0, 1], for a random resized crop, or None.
    crop_ratio: (low, high) width / height of that crop, > 0.
    crop_padding: pixels >= 0: resize, pad by reflection and cut at random instead, or None.
    interpolation: "bilinear", "bicubic" or "lanczos3", antialiased.
    flip: mirror left and right half of the time.
    three_augment: one of grayscale, solarize and blur; DeiT III adds color_jitter (.3, .3, .3, 0).
    color_jitter: (brightness, contrast, saturation, hue) strengths >= 0, hue <= 0.5, or None.
    randaugment: (layers >= 1, magnitude in [0, 30]), or None; what it moves away shows `mean`.
    erase: probability in [0, 1] of random erasing.
    mixup, cutmix: alpha >= 0 of the Beta law, 0 for off. mix_prob: share of batches mixed, [0, 1].
  Raises:
    ValueError: a value is not allowed, named as augment.FIELD; or a batch does not fit the recipe.
  """
  size = (image_size,) * 2 if np.ndim(image_size) == 0 else tuple(image_size)
  _check(len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size), "image_size",
         image_size, "an int > 0 or (height, width)")
  for field, value in dict(mean=mean, std=std).items():
    _check(np.ndim(value) <= 1 and (field == "mean" or np.min(value) > 0), field, value,
           "a number or one a channel, std > 0")
  mean, std = (np.float32(value).reshape(1, 1, -1) for value in (mean, std))
  _check(not (cropped and crop_area) and (crop_padding is None or not (cropped or crop_area)),
         "crop_area", crop_area, "alone: only one of cropped, crop_area, crop_padding may be set")
  _check(crop_area is None or _is_range(crop_area, 1), "crop_area", crop_area,
         "None or (low, high) with 0 < low <= high <= 1")
  _check(_is_range(crop_ratio), "crop_ratio", crop_ratio, "(low, high) with 0 < low <= high")
  _check(crop_padding is None or crop_padding >= 0, "crop_padding", crop_padding, "None or >= 0")
  methods, known = ("bilinear", "bicubic", "lanczos3"), tuple(random_affine.__kwdefaults__)
  _check(interpolation in methods, "interpolation", interpolation, f"one of {methods}", methods)
  affine = dict(affine or {})
  for name in affine:
    _check(name in known, "affine", name, f"a dict with keys from {known}", known)
  _check(_is_range(affine.get("scale", (1, 1))), "affine.scale", affine.get("scale"),
         "(low, high) with 0 < low <= high")
  _check(color_jitter is None or np.shape(color_jitter) == (4,) and min(color_jitter) >= 0
         and color_jitter[3] <= 0.5, "color_jitter", color_jitter,
         "None or four strengths >= 0: brightness, contrast, saturation, hue <= 0.5")
  _check(randaugment is None or np.shape(randaugment) == (2,) and randaugment[0] in range(1, 100)
         and 0 <= randaugment[1] <= 30, "randaugment", randaugment,
         "None or (layers >= 1, magnitude in [0, 30])")
  for field, value, high in (("erase", erase, 1), ("mix_prob", mix_prob, 1),
                             ("mixup", mixup, math.inf), ("cutmix", cutmix, math.inf)):
    _check(0 <= value <= high, field, value, f"in [0, {high}]")

  def to_float(image):
    """uint8 [b, h, w, c] -> float32 in [0, 1]."""
    if image.dtype != jnp.uint8:
      raise ValueError(f'batch["image"] must be uint8, not {image.dtype}')
    for field, value in dict(mean=mean, std=std).items():
      _check(value.size in (1, image.shape[-1]), field, value.ravel().tolist(),
             f"one value, or one for each of the images' {image.shape[-1]} channels")
    return image.astype(jnp.float32) / 255

  def train_image(key, image):
    # One key an operation, on or off: switching one leaves the others' draws as they were.
    affine_key, crop_key, flip_key, three_key, jitter_key, rand_key, erase_key = (
        jax.random.split(key, 7))
    if affine:
      image = random_affine(affine_key, image, **affine)
    if crop_area is not None:
      box = random_box(crop_key, *image.shape[:2], crop_area, crop_ratio)
      image = crop_resize(image, box, size, interpolation)
    elif crop_padding is not None:
      image = padded_crop(crop_key, image, size, crop_padding, interpolation)
    else:
      image = centre_resize(image, size, interpolation)
    if flip:
      image = pix.random_flip_left_right(flip_key, image)
    if three_augment:
      image = one_of_three(three_key, image)
    if color_jitter is not None:
      image = random_jitter(jitter_key, image, color_jitter)
    if randaugment is not None:
      image = rand_augment(rand_key, image, *randaugment, mean)
    image = (image - mean) / std
    return random_erase(erase_key, image, erase) if erase else image

  def train(rng, batch):
    if cropped and batch["image"].shape[1:3] != size:
      raise ValueError(f"augment.cropped: images are {batch['image'].shape[1:3]}, not {size}")
    image_key, mix_key = jax.random.split(rng)
    keys = jax.random.split(image_key, len(batch["image"]))
    image = jax.vmap(train_image)(keys, to_float(batch["image"]))
    if not (mixup or cutmix):
      return {**batch, "image": image}
    image = jax.lax.optimization_barrier(image)  # or its two uses in `mix` compute it twice
    return mix(mix_key, {**batch, "image": image}, mixup, cutmix, mix_prob)

  def evaluate(batch):
    resize = functools.partial(centre_resize, size=size, method=interpolation)
    image = jax.vmap(resize)(to_float(batch["image"]))
    return {**batch, "image": (image - mean[None]) / std[None]}

  return Augment(train, evaluate)
