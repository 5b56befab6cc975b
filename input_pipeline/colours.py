"""Operations on an image's colours, blur among them, and the order in which a recipe has them.

Written for one image and meant to be vmapped: float32 [h, w, c] in [0, 1]. With 3 channels luma is
Rec. 601, otherwise the mean over channels, so grayscale and saturation leave a 1-channel image as
it is; hue moves only 3-channel images. dm-pix's own operation is used where its definition is
Pillow's or torchvision's.
"""

import math
from typing import Any

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def recolour(keys, image, pixels: Any):
  """What a recipe makes of an image's colours.

  Args:
    keys: one an operation: of three_augment, color_jitter, grayscale, blur and solarize.
    pixels: an `augment.images.Pixels`, whose fields of these names say how.
  """
  three_key, jitter_key, gray_key, blur_key, solarize_key = keys

  def to_gray(x):
    return sometimes(gray_key, x, pixels.grayscale, lambda _, x: grayscale(x))

  image = sometimes(three_key, image, float(pixels.three_augment), one_of_three)
  image = to_gray(image) if pixels.grayscale_first else image
  if pixels.color_jitter is not None:
    image = sometimes(jitter_key, image, pixels.jitter_prob,
                      lambda key, x: random_jitter(key, x, pixels.color_jitter))
  image = image if pixels.grayscale_first else to_gray(image)
  image = sometimes(blur_key, image, pixels.blur, random_blur)
  return sometimes(solarize_key, image, pixels.solarize, lambda _, x: solarize(x))


def blend(degenerate, image, factor):
  """Pillow's ImageEnhance: 0 gives `degenerate`, 1 the image, above 1 exaggerates; clipped."""
  return jnp.clip(degenerate + factor * (image - degenerate), 0, 1)


def grayscale(image):
  """Luma in every channel."""
  c = image.shape[-1]
  # Plane by plane: it fuses with its neighbours, and no accelerator rounds it as a product.
  luma = sum(weight * image[..., i] for i, weight in enumerate(LUMA if c == 3 else (1 / c,) * c))
  return jnp.broadcast_to(luma[..., None], image.shape)


def color_jitter(image, factors, order, slot=None):
  """Changes brightness, contrast and saturation, and turns the hue, as torchvision's ColorJitter.

  Args:
    factors: [4]; the last is the hue's turn, 1 = full circle. order: [n], in which order brightness
      (0), contrast (1) and saturation (2) come. slot: after how many of them the hue; None = never.
  """
  def enhance(x, kind, on):
    gray = grayscale(x)
    degenerate = (kind == 1) * gray.mean() + (kind == 2) * gray  # brightness: black
    return blend(degenerate, x, jnp.where(on, factors[kind], 1.0))

  # A switch at each place would, under vmap, compute every operation at each place. So the others
  # stand before the hue and again after it, by a factor of 1 where it is not their turn.
  for i, kind in enumerate(order):
    image = enhance(image, kind, slot is None or i < slot)
  if slot is not None:
    image = pix.adjust_hue(image, factors[3])
    for i, kind in enumerate(order):
      image = enhance(image, kind, i >= slot)
  return image


def random_jitter(key, image, strengths):
  """`color_jitter` in random order.

  Args:
    strengths: of brightness, contrast, saturation and hue, s >= 0. Factors are uniform in
      [max(0, 1 - s), 1 + s], hue's turn in [-s, s] with s <= 0.5. What has s = 0 is left out.
  """
  order_key, slot_key, factor_key = jax.random.split(key, 3)
  s = np.float32(strengths)
  low, high = np.append(np.maximum(0, 1 - s[:3]), -s[3]), np.append(1 + s[:3], s[3])
  factors = jax.random.uniform(factor_key, (4,), minval=low, maxval=high)
  order = jax.random.permutation(order_key, np.flatnonzero(s[:3]))
  turns = s[3] > 0 and image.shape[-1] == 3
  slot = jax.random.randint(slot_key, (), 0, len(order) + 1) if turns else None
  return color_jitter(image, factors, order, slot)


def gaussian_blur(image, sigma, max_sigma=2.0):
  """Blurs by `sigma` pixels, traced or not, at most max_sigma; edges are repeated outwards."""
  (h, w, c), radius = image.shape, math.ceil(3 * max_sigma)
  taps = range(2 * radius + 1)
  kernel = jax.nn.softmax(-0.5 * ((np.arange(2 * radius + 1) - radius) / sigma) ** 2)
  # Shifted sums: in a convolution each image, with a kernel of its own, would be its own group.
  # Rows are flat, neighbours c apart: a last axis of one or three would not vectorise.
  image = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), "edge")
  image = image.reshape(h + 2 * radius, -1)
  # Without the barrier XLA computes the first pass anew for each tap of the second.
  image = jax.lax.optimization_barrier(sum(kernel[k] * image[k:k + h] for k in taps))
  return sum(kernel[k] * image[:, k * c:(k + w) * c] for k in taps).reshape(h, w, c)


def random_blur(key, image):
  """Gaussian blur by 0.1 to 2 pixels, uniform (2002.05709, app. A; 2003.04297, sec. 2)."""
  return gaussian_blur(image, jax.random.uniform(key, minval=0.1, maxval=2.0))


def solarize(image):
  """Inverts what 8 bits would round to 128 or more, Pillow's default threshold."""
  return pix.solarize(image, 127.5 / 255)


def sometimes(key, image, prob, op):
  """`op`(key, image) with probability `prob`, a Python number, else the image."""
  if prob == 0:
    return image
  apply_key, op_key = jax.random.split(key)
  out = op(op_key, image)
  if prob < 1:
    out = jnp.where(jax.random.bernoulli(apply_key, prob), out, image)
  # Without the barrier XLA computes `out` anew for each of its uses: a blur has thirteen.
  return jax.lax.optimization_barrier(out)


def one_of_three(key, image):
  """DeiT III's 3-Augment (2204.07118, sec. 3.3): grayscale, solarize or blur, equally likely."""
  which_key, blur_key = jax.random.split(key)
  return jax.lax.switch(jax.random.randint(which_key, (), 0, 3), [
      grayscale, solarize, lambda x: random_blur(blur_key, x)], image)
