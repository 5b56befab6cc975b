"""RandAugment (1909.13719) as its two much used code bases have it: timm's and big_vision's.

Both work on images of 8 bits, one operation on the result of the one before. So does this module:
an image is float32 [h, w, c] of whole numbers in [0, 255], and each operation gives such a one. The
operations are of four families, each computed once a layer under vmap, whichever is drawn.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import erasing

TABLES = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLENDS = ("color", "contrast", "brightness", "sharpness")
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*TABLES, *BLENDS, *MOVES, "cutout")  # the last in big_vision alone
NEAREST = "nearest"  # big_vision samples so; timm as its crops, "linear" or "bicubic"
SPELLING = ("timm's 'rand' and, each after a '-', m (magnitude, whole, in [0, 10]), mstd (its "
            "deviation, in [0, 100]), inc (0 or 1), n (layers, at least 1), p (in [0, 1])")


def read(value, interpolation, check) -> dict:
  """What `rand_augment` needs, from the config's field.

  Args:
    value: (layers, magnitude) for big_vision's, as AugReg and 2205.01580 train; or timm's spelling,
      "rand-m9-mstd0.5-inc1", for timm's, as DeiT trains and MAE fine-tunes.
    interpolation: of the recipe; timm's moves sample by it.
    check: (whether, field, value, what is allowed); it raises a ValueError.
  """
  if not isinstance(value, str):
    check(np.shape(value) == (2,) and value[0] in range(1, 100) and 0 <= value[1] <= 30,
          "randaugment", value,
          "None, (layers >= 1, magnitude in [0, 30]) for big_vision's, or " + SPELLING)
    return dict(layers=int(value[0]), magnitude=float(value[1]), sampling=NEAREST)
  name, *parts = value.split("-")
  parts = [re.fullmatch(r"(m|mstd|inc|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
  check(name == "rand" and all(parts), "randaugment", value, SPELLING)
  found = dict(m=10, mstd=0, inc=0, n=2, p=0.5) | {key: float(x) for key, x in
                                                   (part.groups() for part in parts)}
  check(found["m"] in range(11) and found["mstd"] <= 100 and found["inc"] in (0, 1)
        and found["n"] in range(1, 100) and found["p"] <= 1, "randaugment", value, SPELLING)
  sampling = {"bilinear": "linear"}.get(interpolation, interpolation)
  check(sampling in ("linear", "bicubic"), "interpolation", interpolation,
        "'linear' or 'bicubic', as timm's randaugment samples")
  return dict(layers=int(found["n"]), magnitude=float(found["m"]), deviation=found["mstd"],
              prob=found["p"], increasing=bool(found["inc"]), sampling=sampling)


def rand_augment(key, image, fill, *, layers, magnitude, sampling, deviation=0.0, prob=1.0,
                 increasing=False):
  """In each of `layers`, one of timm's 15 or big_vision's 16 operations, equally likely.

  Args:
    image: float32 [h, w, c] in [0, 1]. fill: the same, [1, 1, c] or [1, 1, 1], shown where the
      image was cut out or moved away; both are rounded to 8 bits.
    magnitude: of all operations; with a `deviation` > 0 each draws its own from a normal law,
      clipped to [0, 10]. prob: that a layer does what it drew.
    sampling: of moves; "nearest" is big_vision, the others are timm. increasing: see `levels`.
  Source:
    timm/data/auto_augment.py (0.3.2, `rand_augment_transform`) and big_vision/pp/archive/
    autoaugment.py (`distort_image_with_randaugment`).
  """
  image, fill = jnp.round(image * 255), jnp.round(jnp.asarray(fill, jnp.float32) * 255)
  for layer_key in jax.random.split(key, layers):
    op_key, apply_key, level_key, sign_key, place_key = jax.random.split(layer_key, 5)
    level = magnitude
    if deviation:
      level = jnp.clip(magnitude + deviation * jax.random.normal(level_key), 0, 10)
    op = jax.random.randint(op_key, (), 0, len(OPERATIONS) - (sampling != NEAREST))
    place = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.array(image.shape[:2]))
    out = operate(image, op, level, jax.random.rademacher(sign_key, dtype=jnp.float32), place, fill,
                  sampling, increasing)
    # Without the barrier XLA fuses one layer's operations into each of the next.
    image = jax.lax.optimization_barrier(
        jnp.where(jax.random.bernoulli(apply_key, prob), out, image) if prob < 1 else out)
  return image / 255


def operate(image, op, level, sign, place, fill, sampling, increasing=False):
  """Operation number `op` of OPERATIONS.

  Args:
    image: float32 [h, w, c], whole numbers in [0, 255]. fill: [1, 1, c] or [1, 1, 1] of such.
    level: a Python float, or a traced one. sign: 1 or -1, of what can go either way. place: (row,
      column), the centre of Cutout's box. sampling, increasing: see `rand_augment`.
  """
  pillow = sampling != NEAREST
  argument = levels(level, sign, increasing, pillow)
  of_family = op - np.cumsum([0, len(TABLES), len(BLENDS), len(MOVES)])
  outs = [by_table(image, jnp.clip(op, 0, len(TABLES) - 1), argument),
          by_blend(image, of_family[1], argument["factor"], pillow),
          by_move(image, of_family[2], argument, fill, sampling)]
  if not pillow:
    pad = jnp.floor(argument["share"] * 40 * min(image.shape[:2]) / 224)
    outs.append(erasing.fill_box(image, *(place - pad), 2 * pad, 2 * pad, fill))
  return jax.lax.select_n((of_family[1:] >= 0).sum(dtype=jnp.int32), *outs)


def levels(level, sign, increasing, pillow) -> dict:
  """The operations' arguments at a level, 10 being the largest of AutoAugment (1805.09501).

  Increasing, as timm's "inc1": Posterize keeps fewer bits, Solarize inverts more and an enhancement
  goes further from 1, either way, the higher the level. Otherwise, as in AutoAugment, Posterize
  keeps up to 4 bits, Solarize inverts from up to 256 and enhancements go from 0.1 to 1.9.
  TensorFlow keeps at least one bit, and its threshold has 8: at level 10, 256 is 0, which inverts
  all, at AugReg's 15, 384 is 128.
  """
  share = level / 10
  bits, threshold = jnp.floor(share * 4), jnp.floor(share * 256)
  if not pillow:
    bits, threshold = jnp.clip(bits, 1, 8), threshold % 256
  return {
      "share": share, "angle": sign * share * math.radians(30), "shear": sign * share * 0.3,
      "move": sign * share, "add": jnp.floor(share * 110),
      "bits": 4 - bits if increasing else bits,
      "threshold": 256 - threshold if increasing else threshold,
      "factor": 1 + sign * share * 0.9 if increasing else share * 1.8 + 0.1}


def by_table(image, op, argument):
  """Operation number `op` of TABLES: each maps a channel's 256 values, by Pillow's integers."""
  flat = image.reshape(-1, image.shape[-1]).astype(jnp.int32)                      # hw c
  i = jnp.broadcast_to(jnp.arange(256)[:, None], (256, flat.shape[1]))             # 256 c
  low, high = flat.min(0, keepdims=True), flat.max(0, keepdims=True)               # 1 c
  stretched = jnp.clip((i - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
  count = jax.vmap(lambda x: jnp.bincount(x, length=256), 1, 1)(flat)              # 256 c
  step = (len(flat) - jnp.take_along_axis(count, high, 0)) // 255                  # 1 c
  equalized = (step // 2 + jnp.cumsum(count, 0) - count) // jnp.maximum(step, 1)
  unit = 2 ** (8 - argument["bits"]).astype(jnp.int32)
  tables = jnp.stack([
      jnp.where(high > low, stretched, i), jnp.where(step > 0, jnp.minimum(equalized, 255), i),
      255 - i, i // unit * unit, jnp.where(i < argument["threshold"], i, 255 - i),
      jnp.where(i < 128, jnp.minimum(i + argument["add"].astype(jnp.int32), 255), i)])
  return jnp.take_along_axis(tables[op], flat, 0).reshape(image.shape).astype(jnp.float32)


def luma(image, pillow):
  """Rec. 601 of 3 channels, else their mean, rounded as Pillow or TensorFlow does: [h, w, 1]."""
  if image.shape[-1] != 3:
    return jnp.round(image.mean(-1, keepdims=True))
  r, g, b = jnp.split(image, 3, -1)
  if not pillow:
    return jnp.floor((0.2989 * r + 0.587 * g + 0.114 * b) * (255.5 / 255))
  # Pillow's sum in 16 bits of fraction is below 2^24, so that float32 holds it.
  return jnp.floor((19595 * r + 38470 * g + 7471 * b + 32768) / 65536)


def by_blend(image, op, factor, pillow):
  """Operation number `op` of BLENDS: `factor` 0 gives what it leads to, 1 the image, as Pillow.

  That is gray, a flat gray, black or a smooth image. TensorFlow's flat gray is not the image's
  mean: it divides the number of pixels by 256, which at 224 pixels, taken here for all sizes, is
  196.
  """
  gray = luma(image, pillow)
  mean = jnp.floor(gray.mean() + 0.5) if pillow else 196.0
  smooth = jax.lax.reduce_window(image, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "VALID")
  smooth = jnp.floor((smooth + 4 * image[1:-1, 1:-1]) / 13 + 0.5 * pillow)
  start = jnp.where(op == 0, gray, jnp.where(op == 1, mean, 0.0))
  start = jnp.where(op == 3, image.at[1:-1, 1:-1].set(smooth), start)
  return jnp.floor(jnp.clip(start + factor * (image - start), 0, 255))


def by_move(image, op, argument, fill, sampling):
  """Operation number `op` of MOVES; outside the image is `fill`.

  Rotation is about the image's centre, a shear about its corner: of the area in Pillow, of the
  first pixel in TensorFlow. Translations are, at level 10, 0.45 of the side in timm and 100 / 224
  in big_vision, which has 100 pixels whatever the size.
  """
  h, w, _ = image.shape
  pillow = sampling != NEAREST
  rotates, shear_x, shear_y, move_x, move_y = (op == i for i in range(5))
  reach = argument["move"] * (0.45 if pillow else 100 / 224)
  angle, shear = rotates * argument["angle"], argument["shear"]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  corner = -0.5 if pillow else 0.0
  x0, y0 = (jnp.where(rotates, (side - 1) / 2, corner) for side in (w, h))
  y, x = np.mgrid[:h, :w].astype(np.float32)
  x, y = x - x0, y - y0
  return sample(image, cos * x + (shear_x * shear - sin) * y + x0 + move_x * reach * w,
                (shear_y * shear + sin) * x + cos * y + y0 + move_y * reach * h, fill, sampling)


def sample(image, x, y, fill, sampling):
  """The image at (x, y) [h, w], whole numbers at its pixels' centres, as Pillow interpolates.

  Its cubic is the one with slope -1 (Keys' a), unlike that of its resizing. Its results, of 8 bits,
  are cut, not rounded. Beyond the image's area is `fill`, within it what the edge lacks repeats it.
  """
  h, w, c = image.shape
  flat = image.reshape(-1, c)
  inside = (x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)
  if sampling == NEAREST:
    x, y, taps = x + 0.5, y + 0.5, (0,)
  else:
    taps = (0, 1) if sampling == "linear" else (-1, 0, 1, 2)
  column, row = jnp.floor(x), jnp.floor(y)

  def pixels(down, right):
    i = jnp.clip(row.astype(jnp.int32) + down, 0, h - 1) * w
    return flat[i + jnp.clip(column.astype(jnp.int32) + right, 0, w - 1)]          # h w c

  across, along = (x - column)[..., None], (y - row)[..., None]
  value = between([between([pixels(i, j) for j in taps], across) for i in taps], along)
  return jnp.where(inside[..., None], jnp.floor(jnp.clip(value, 0, 255)), fill)


def between(values, share):
  """Pillow's interpolation at `share` of the way between the middle two of 1, 2 or 4 values."""
  if len(values) == 1:
    return values[0]
  if len(values) == 2:
    return values[0] + share * (values[1] - values[0])
  a, b, c, d = values  # in Pillow's form, not by weights: equal values give the same, to the bit
  return b + share * (c - a + share * (2 * (a - b) + c - d + share * (b - a - c + d)))
