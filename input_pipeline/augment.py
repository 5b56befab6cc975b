"""Augmentation on the device: uint8 batches in, normalised float32 batches out, all under jit.

Images come cut to their size by `geometry`, on the host; what changes their pixels is here. The
operations of `image_ops` are vmapped over per-example keys, so what happens to an example depends
on (rng, its place in the batch) and never on the mesh.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import geometry, image_ops


class Augment(NamedTuple):
  """A recipe; both functions keep every key of the batch and replace "image"."""
  train: Callable  # (rng, batch) -> batch: uint8 [b, h, w, c] -> float32 [b, H, W, c], normalised;
  #                  with "image_2", of the same shape, where the recipe has a second view
  eval: Callable   # (batch) -> batch: the same shapes, deterministic; one view
  to_pixels: Callable  # (images as these give them) -> NumPy, 0 is black and 1 white


PARTNERS = ("mirror", "previous")


def draw_share(key, height, width, mixup, cutmix, prob, partner):
  """What one group of `mix` draws: the weight of the own pixels [h, w, 1], and of the own label."""
  apply_key, coin_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 5)
  ones = jnp.ones((height, width, 1))
  if mixup:
    weight = jax.random.beta(mixup_key, mixup, mixup)
    weight = jnp.maximum(weight, 1 - weight) if partner == "previous" else weight
    own = weight * ones
  if cutmix:
    # The box of timm 0.3.2, for which DeiT and MAE ask: its sides are even, later ones' are not.
    lengths = jnp.array([height, width])
    half = jnp.floor(lengths * jnp.sqrt(1 - jax.random.beta(cutmix_key, cutmix, cutmix))) // 2
    corner = jax.random.randint(place_key, (2,), 0, lengths) - half
    box = image_ops.fill_box(ones, *corner, *(2 * half), 0.0)
    take = ~jax.random.bernoulli(coin_key) if mixup else True
    own = jnp.where(take, box, own if mixup else 1.0)
    weight = jnp.where(take, box.mean(), weight if mixup else 1.0)
  apply = jax.random.bernoulli(apply_key, prob)
  return jnp.where(apply, own, ones), jnp.where(apply, weight, 1.0)


def mix(key, batch, mixup, cutmix, prob=1.0, size=None, partner="mirror"):
  """Mixup (1710.09412) or CutMix (1905.04899) of examples with others of their group.

  One draw a group: lambda ~ Beta(alpha, alpha), and a fair coin between the two where both are on.

  Args:
    batch: "image" float [b, h, w, c] and "label" int [b]. mixup, cutmix: alpha, 0 for off.
    prob: that a group is mixed. size: consecutive examples in a group, None for the batch.
    partner: "mirror", the example at the group's other end (timm/data/mixup.py, mode "batch", each
      process for its own batch); or "previous" in it, round about, with the larger of lambda and
      1 - lambda for the own example (big_vision/utils.py, `get_mixup`).
  Returns:
    the batch with "label_mix" int [b] and "mix" float32 [b], the weight of the example's own label:
    for CutMix its share of the pixels, once the box is clipped at the edge.
  Raises:
    ValueError: the batch has no labels, or does not consist of groups of that size.
  """
  if "label" not in batch:
    raise ValueError(f"augment.mixup and augment.cutmix need labels, not only {sorted(batch)}")
  b, h, w, _ = batch["image"].shape
  size = size or b
  check_mix_size(size, b)

  def grouped(x):  # consecutive rows are on one device: where groups are, nothing crosses
    return x.reshape(b // size, size, *x.shape[1:])

  def other(x):
    x = grouped(x)
    return x[:, ::-1] if partner == "mirror" else jnp.roll(x, 1, 1)

  draw = functools.partial(draw_share, height=h, width=w, mixup=mixup, cutmix=cutmix, prob=prob,
                           partner=partner)
  own, weight = jax.vmap(draw)(jax.random.split(key, b // size))                   # g h w 1, g
  own = own[:, None]
  image = own * grouped(batch["image"]) + (1 - own) * other(batch["image"])
  return {**batch, "image": image.reshape(batch["image"].shape),
          "label_mix": other(batch["label"]).reshape(b),
          "mix": jnp.repeat(weight, size)}


def check_mix_size(size, batch_size):
  if batch_size % size:
    raise ValueError(f"augment.mix_size = {size}: must be None, for the whole batch, or divide "
                     f"its {batch_size} examples")


def one_view(section, view, *, mean: float | tuple[float, ...] = 0.5,
             std: float | tuple[float, ...] = 0.5, affine: Mapping | None = None,
             three_augment: bool = False, grayscale_first: bool = False,
             color_jitter: tuple[float, ...] | None = None, jitter_prob: float = 1.0,
             grayscale: float = 0.0, blur: float = 0.0, solarize: float = 0.0, flip: bool = False,
             randaugment: str | tuple | None = None, erase: float = 0.0, mixup: float = 0.0,
             cutmix: float = 0.0, mix_prob: float = 1.0, mix_size: int | None = None,
             mix_partner: Literal[*PARTNERS] = "mirror") -> Augment:
  """The recipe of one view; operations run in the order of the keywords from `affine` on.

  Args:
    section: of the config, for errors.
    view: how the images that come were cut: see `geometry.View`.
    mean, std: of pixels in [0, 1], a float or one a channel: (x - mean) / std.
    affine: dict of `random_affine`'s keywords, or None.
    three_augment: one of grayscale, solarize and blur; DeiT III adds color_jitter (.3, .3, .3, 0).
    grayscale_first: grayscale before color_jitter, as in MoCo v1, instead of after it.
    color_jitter: (brightness, contrast, saturation, hue) strengths >= 0, hue <= 0.5, or None.
    jitter_prob, grayscale, blur, solarize: probability in [0, 1] of color_jitter and of each of
      these; blur by 0.1 to 2 pixels.
    flip: mirror left and right half of the time.
    randaugment: (layers >= 1, magnitude in [0, 30]) for big_vision's, a string such as
      "rand-m9-mstd0.5-inc1" for timm's, or None; what it moves away shows `mean`.
    erase: probability in [0, 1] of random erasing.
    mixup, cutmix: alpha >= 0 of the Beta law, 0 for off.
    mix_prob: share of groups mixed, [0, 1].
    mix_size: consecutive examples that share a draw and are mixed among themselves: what a device
      had in the run to repeat. It divides the batch; None is the whole batch.
    mix_partner: "mirror" as timm or "previous" as big_vision, see `mix`.
  Raises:
    ValueError: a value is not allowed, named as SECTION.FIELD; or a batch does not fit the recipe.
  """
  check, size = functools.partial(geometry.check, section), view.image_size
  for field, value in dict(mean=mean, std=std).items():
    check(np.ndim(value) <= 1 and (field == "mean" or np.min(value) > 0), field, value,
          "a number or one a channel, std > 0")
  mean, std = (np.float32(value).reshape(1, 1, -1) for value in (mean, std))
  affine, known = dict(affine or {}), tuple(image_ops.random_affine.__kwdefaults__)
  for name in affine:
    check(name in known, "affine", name, f"a dict with keys from {known}", known)
  check(geometry.is_range(affine.get("scale", (1, 1))), "affine.scale", affine.get("scale"),
        "(low, high) with 0 < low <= high")
  check(color_jitter is None or np.shape(color_jitter) == (4,) and min(color_jitter) >= 0
        and color_jitter[3] <= 0.5, "color_jitter", color_jitter,
        "None or four strengths >= 0: brightness, contrast, saturation, hue <= 0.5")
  if randaugment is not None:
    from input_pipeline import rand_augment
    layers = rand_augment.read(randaugment, view.interpolation, check)
  check(mix_size is None or type(mix_size) is int and mix_size > 0, "mix_size", mix_size,
        "None or an int > 0")
  check(mix_partner in PARTNERS, "mix_partner", mix_partner, f"one of {PARTNERS}", PARTNERS)
  for field, value, high in (
      ("jitter_prob", jitter_prob, 1), ("grayscale", grayscale, 1), ("blur", blur, 1),
      ("solarize", solarize, 1), ("erase", erase, 1), ("mix_prob", mix_prob, 1),
      ("mixup", mixup, math.inf), ("cutmix", cutmix, math.inf)):
    check(0 <= value <= high, field, value, f"in [0, {high}]")

  def to_float(image):
    """uint8 [b, h, w, c] -> float32 in [0, 1]."""
    if image.dtype != jnp.uint8:
      raise ValueError(f'batch["image"] must be uint8, not {image.dtype}')
    if image.shape[1:3] != size:
      raise ValueError(f'batch["image"] is {image.shape[1:3]}, not cut to {section}.image_size = '
                       f"{size}")
    for field, value in dict(mean=mean, std=std).items():
      check(value.size in (1, image.shape[-1]), field, value.ravel().tolist(),
            f"one value, or one for each of the images' {image.shape[-1]} channels")
    return image.astype(jnp.float32) / 255

  def to_gray(key, image):
    return image_ops.sometimes(key, image, grayscale, lambda _, x: image_ops.grayscale(x))

  def train_image(key, image):
    # One key an operation, on or off: switching one leaves the others' draws as they were.
    (affine_key, _, three_key, jitter_key, gray_key, blur_key, solarize_key, flip_key, rand_key,
     erase_key) = jax.random.split(key, 10)  # the second was the crop's, once
    if affine:
      image = image_ops.random_affine(affine_key, image, **affine)
    image = image_ops.sometimes(three_key, image, float(three_augment), image_ops.one_of_three)
    if grayscale_first:
      image = to_gray(gray_key, image)
    if color_jitter is not None:
      image = image_ops.sometimes(jitter_key, image, jitter_prob,
                                  lambda key, x: image_ops.random_jitter(key, x, color_jitter))
    if not grayscale_first:
      image = to_gray(gray_key, image)
    image = image_ops.sometimes(blur_key, image, blur, image_ops.random_blur)
    image = image_ops.sometimes(solarize_key, image, solarize, lambda _, x: image_ops.solarize(x))
    if flip:
      image = pix.random_flip_left_right(flip_key, image)
    if randaugment is not None:
      image = rand_augment.rand_augment(rand_key, image, mean, **layers)
    image = (image - mean) / std
    return image_ops.random_erase(erase_key, image, erase) if erase else image

  def train(rng, batch):
    image_key, mix_key = jax.random.split(rng)
    keys = jax.random.split(image_key, len(batch["image"]))
    image = jax.vmap(train_image)(keys, to_float(batch["image"]))
    if not (mixup or cutmix):
      return {**batch, "image": image}
    image = jax.lax.optimization_barrier(image)  # or its two uses in `mix` compute it twice
    return mix(mix_key, {**batch, "image": image}, mixup, cutmix, mix_prob, mix_size, mix_partner)

  def evaluate(batch):
    return {**batch, "image": (to_float(batch["image"]) - mean[None]) / std[None]}

  return Augment(train, evaluate, lambda image: np.asarray(image) * std + mean)


# By two views.
SHARED = ("image_size", "eval_crop", "eval_squash", "mixup", "cutmix", "mix_prob", "mix_size",
          "mix_partner")


def make(*, second_view: Mapping | None = None, batch_size: int | None = None,
         **fields: (geometry.View, one_view)) -> Augment:
  """The recipe of `config.augment`: one view of each image, or two for contrastive learning.

  Args:
    second_view: None, or a dict, maybe empty, of the fields in which the recipe of a second view,
      "image_2" [b, H, W, c] of training batches, differs. It comes cut as "image_2", or, where
      nothing is cut, is another view of "image".
    batch_size: examples of a training batch, if known, to check mix_size before anything runs.
    fields: of `geometry.View`, by which images come cut to image_size; and of `one_view`.
  Raises:
    ValueError: as these; a field of second_view is named augment.second_view.FIELD.
  """
  def one(section, fields):
    view = geometry.view(section, **{k: v for k, v in fields.items() if k in geometry.View._fields})
    return one_view(section, view, **{k: v for k, v in fields.items()
                                      if k not in geometry.View._fields})

  check = functools.partial(geometry.check, "augment")
  check(fields.get("image_size") is not None, "image_size", None, "given")
  first = one("augment", fields)
  if batch_size and fields.get("mix_size") and (fields.get("mixup") or fields.get("cutmix")):
    check_mix_size(fields["mix_size"], batch_size)
  if second_view is None:
    return first
  check(hasattr(second_view, "keys"), "second_view", second_view, "None or a dict")
  allowed = {*geometry.View._fields, *inspect.signature(one_view).parameters}
  second_view, allowed = dict(second_view), sorted(allowed - {"section", "view", *SHARED})
  for name in second_view:
    if name not in allowed:
      near = difflib.get_close_matches(name, allowed, 1)
      raise ValueError(f"augment.second_view.{name}: two views differ in no such field; "
                       + (f"did you mean {near[0]!r}?" if near else f"allowed: {allowed}"))
  for name in ("mixup", "cutmix"):
    check(not fields.get(name), name, fields.get(name), "0 with a second_view")
  second = one("augment.second_view", fields | second_view)

  def train(rng, batch):
    first_key, second_key = jax.random.split(rng)
    other = {"image": batch.get("image_2", batch["image"])}
    return {**first.train(first_key, batch),
            "image_2": second.train(second_key, other)["image"]}

  return first._replace(train=train)
