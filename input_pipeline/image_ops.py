"""Image operations for augmentation, written for one image and meant to be vmapped.

Images are float32 [h, w, c] in [0, 1]. With 3 channels luma is Rec. 601, otherwise the mean over
channels, so grayscale and saturation leave a 1-channel image as it is; hue moves only 3-channel
images. dm-pix's own operation is used where its definition is Pillow's or torchvision's.
"""

import functools
import math

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def affine_matrix(angle, shear_x, shear_y, move_x, move_y, scale=1.0):
  """Rotation (radians) @ shear (slopes) / scale, then a move (pixels): [3, 3].

  It maps an output place (x, y, 1), counted from the image's centre, to the input place seen there.
  """
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.array([[(c - s * shear_y) / scale, (c * shear_x - s) / scale, move_x],
                    [(s + c * shear_y) / scale, (s * shear_x + c) / scale, move_y],
                    [0, 0, 1]])


def warp(image, matrix, fill=None, order=1):
  """Samples `image` at `matrix` @ place; outside is `fill`, or the nearest edge.

  Bilinearly, or with `order` 0 the nearest pixel.
  """
  h, w, _ = image.shape
  centre = np.array([(w - 1) / 2, (h - 1) / 2, 0], np.float32).reshape(3, 1, 1)
  y, x = np.mgrid[:h, :w].astype(np.float32)
  grid = np.stack([x, y, np.ones_like(x)]) - centre  # xy1 h w
  # The accelerators' default precision would misplace pixels by up to half of one.
  x, y, _ = jnp.einsum("ij,jhw->ihw", matrix, grid, precision="highest") + centre
  sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=order,
                             mode="nearest" if fill is None else "constant")
  offset = 0.0 if fill is None else fill  # the constant of "constant" is 0
  return jax.vmap(sample, -1, -1)(image - offset) + offset


def random_matrix(key, h, w, *, degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0):
  """A random `affine_matrix` for images of h x w pixels; the keywords are `random_affine`'s."""
  u = jax.random.uniform(key, (5,), minval=-1, maxval=1)
  return affine_matrix(
      u[0] * math.radians(degrees), jnp.tan(u[1] * math.radians(shear)), 0.0, u[2] * translate * w,
      u[3] * translate * h, scale[0] + (scale[1] - scale[0]) * (u[4] + 1) / 2)


def random_affine(key, image, *, degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0):
  """One random affine resample; the edge fills what comes into view.

  Args:
    degrees: rotation, uniform in +-degrees. translate: shift, +-share of the side, per axis.
    scale: (low, high) factor, uniform. shear: of x along y, uniform in +-shear degrees.
  """
  return warp(image, random_matrix(key, *image.shape[:2], degrees=degrees, translate=translate,
                                   scale=scale, shear=shear))


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


def fill_box(image, top, left, height, width, fill):
  """Replaces the box (pixels, clipped at the edge) by `fill`, broadcast against the image."""
  h, w, _ = image.shape
  y, x = np.mgrid[:h, :w] + 0.5
  inside = (y > top) & (y < top + height) & (x > left) & (x < left + width)
  return jnp.where(inside[..., None], fill, image)


def erase_box(key, height, width, tries=10):
  """A box as timm's RandomErasing draws it: the first of ten tries smaller than the image.

  Its area is uniform in [0.02, 1/3] of the image's, its height / width log-uniform in [0.3, 1/0.3],
  its place uniform (1708.04896, algorithm 1; timm/data/random_erasing.py).

  Returns:
    float32 [4]: top, left, height, width in whole pixels; height and width 0 where no try fits.
  """
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  area = height * width * jax.random.uniform(area_key, (tries,), minval=0.02, maxval=1 / 3)
  reach = math.log(1 / 0.3)
  aspect = jnp.exp(jax.random.uniform(aspect_key, (tries,), minval=-reach, maxval=reach))
  size = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], -1)))        # tries 2
  limit = jnp.array([[height, width]], jnp.float32)
  fits = jnp.all(size < limit, -1)
  size = size[jnp.argmax(fits)] * fits.any()
  place = jnp.floor(jax.random.uniform(place_key, (2,)) * (limit[0] - size + 1))
  return jnp.concatenate([place, size])


def random_erase(key, image, prob):
  """Random erasing as in DeiT: the box of `erase_box` turns into N(0, 1) noise."""
  apply_key, box_key, noise_key = jax.random.split(key, 3)
  box = erase_box(box_key, *image.shape[:2])
  erased = fill_box(image, *box, jax.random.normal(noise_key, image.shape))
  return jnp.where(jax.random.bernoulli(apply_key, prob), erased, image)
