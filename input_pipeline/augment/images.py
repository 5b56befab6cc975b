"""Augmentation of images on the device: uint8 batches in, normalised float32 batches out.

Images come cut to their size by `geometry`, on the host; what changes their pixels is here: the
operations of the files beside this folder, each loaded by a recipe that names it, are vmapped over
per-example keys. Masks, boxes, depth and points of an image move as it does.
"""

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import geometry
from input_pipeline.augment import Augment
from input_pipeline.records import is_moved

PARTNERS = ("mirror", "previous")  # of `mixing.mix`, as timm and as big_vision


class Pixels(NamedTuple):
  """What becomes of the pixels of one view, in the order of the fields from `affine` on."""
  mean: float | tuple[float, ...] = 0.5  # of pixels in [0, 1], one or one a channel,
  std: float | tuple[float, ...] = 0.5  # and their deviation: (x - mean) / std
  affine: Mapping | None = None  # keywords of `image_ops.random_affine`, or None
  three_augment: bool = False  # one of grayscale, solarize and blur; DeiT III adds color_jitter
  #                              (.3, .3, .3, 0)
  grayscale_first: bool = False  # grayscale before color_jitter, as in MoCo v1, instead of after it
  color_jitter: tuple[float, ...] | None = None  # (brightness, contrast, saturation, hue) strengths
  #                                                >= 0, hue <= 0.5, or None
  jitter_prob: float = 1.0  # probability in [0, 1] of color_jitter,
  grayscale: float = 0.0  # of grayscale,
  blur: float = 0.0  # of a blur by 0.1 to 2 pixels,
  solarize: float = 0.0  # and of solarize
  flip: bool = False  # mirror left and right half of the time
  randaugment: str | tuple | None = None  # (layers >= 1, magnitude in [0, 30]) for big_vision's, a
  #                                         string such as "rand-m9-mstd0.5-inc1" for timm's, or
  #                                         None; what it moves away shows `mean`
  erase: float = 0.0  # probability in [0, 1] of random erasing
  mixup: float = 0.0  # alpha >= 0 of its Beta law, 0 for off
  cutmix: float = 0.0  # the same
  mix_prob: float = 1.0  # share of groups mixed, [0, 1]
  mix_size: int | None = None  # consecutive examples that share a draw and are mixed among
  #                              themselves: what a device had in the run to repeat. It divides the
  #                              batch; None is the whole batch
  mix_partner: Literal[*PARTNERS] = "mirror"  # as timm or big_vision, see `mixing.mix`


def check_pixels(section: str, pixels: Pixels) -> None:
  """Raises ValueError, named as SECTION.FIELD, for a value that is not allowed."""
  check, affine = functools.partial(geometry.check, section), dict(pixels.affine or {})
  for field, value in dict(mean=pixels.mean, std=pixels.std).items():
    check(np.ndim(value) <= 1 and (field == "mean" or np.min(value) > 0), field, value,
          "a number or one a channel, std > 0")
  if affine:
    from input_pipeline import image_ops
    known = tuple(image_ops.random_affine.__kwdefaults__)
    for name in affine:
      check(name in known, "affine", name, f"a dict with keys from {known}", known)
    check(geometry.is_range(affine.get("scale", (1, 1))), "affine.scale", affine.get("scale"),
          "(low, high) with 0 < low <= high")
  jitter = pixels.color_jitter
  check(jitter is None or np.shape(jitter) == (4,) and min(jitter) >= 0 and jitter[3] <= 0.5,
        "color_jitter", jitter,
        "None or four strengths >= 0: brightness, contrast, saturation, hue <= 0.5")
  check(pixels.mix_size is None or type(pixels.mix_size) is int and pixels.mix_size > 0, "mix_size",
        pixels.mix_size, "None or an int > 0")
  check(pixels.mix_partner in PARTNERS, "mix_partner", pixels.mix_partner, f"one of {PARTNERS}",
        PARTNERS)
  for field in ("jitter_prob", "grayscale", "blur", "solarize", "erase", "mix_prob"):
    check(0 <= getattr(pixels, field) <= 1, field, getattr(pixels, field), "in [0, 1]")
  for field in ("mixup", "cutmix"):
    check(0 <= getattr(pixels, field), field, getattr(pixels, field), "in [0, inf]")


def random_example(key, example, pixels: Pixels, others: Mapping[str, str], layers) -> dict:
  """One example in training: "image" float32 [h, w, c] in [0, 1], and `others` {name: kind}.

  Returns it normalised, all moved alike. `layers` are what RandAugment was read as, if asked for.
  """
  # One key an operation, on or off: switching one leaves the others' draws as they were.
  (affine_key, _, three_key, jitter_key, gray_key, blur_key, solarize_key, flip_key, rand_key,
   erase_key) = jax.random.split(key, 10)  # the second was the crop's, once
  image, mean, std, matrix = example["image"], *_planes(pixels), None
  if pixels.affine:
    from input_pipeline import image_ops
    matrix = image_ops.random_matrix(affine_key, *image.shape[:2], **pixels.affine)
    image = image_ops.warp(image, matrix)
  if (pixels.three_augment or pixels.color_jitter is not None or pixels.grayscale or pixels.blur
      or pixels.solarize):
    from input_pipeline import colours
    image = colours.recolour((three_key, jitter_key, gray_key, blur_key, solarize_key), image,
                             pixels)
  image = pix.random_flip_left_right(flip_key, image) if pixels.flip else image
  if layers is not None:
    from input_pipeline import rand_augment
    image = rand_augment.rand_augment(rand_key, image, mean, **layers)
  image = (image - mean) / std
  if pixels.erase:
    from input_pipeline import erasing
    image = erasing.random_erase(erase_key, image, pixels.erase)
  if not others:
    return {"image": image}
  from input_pipeline import moves
  mirrored = jax.random.bernoulli(flip_key, 0.5) if pixels.flip else None
  return {"image": image} | {
    name: moves.move(example[name], kind, image.shape[:2], matrix, mirrored)
    for name, kind in others.items()}


def _planes(pixels: Pixels):
  return (np.float32(value).reshape(1, 1, -1) for value in (pixels.mean, pixels.std))


def one_view(section: str, view: geometry.View, pixels: Pixels,
             others: Mapping[str, str]) -> Augment:
  """The recipe of one view of images and of `others`, what moves with them, {name: kind}.

  Raises ValueError where a value is not allowed, named as SECTION.FIELD, or where a batch does not
  fit the recipe.
  """
  check_pixels(section, pixels)
  check, (mean, std), layers = functools.partial(geometry.check, section), _planes(pixels), None
  if pixels.randaugment is not None:
    from input_pipeline import rand_augment
    layers = rand_augment.read(pixels.randaugment, view.interpolation, check)
  for field in ("randaugment", "mixup", "cutmix"):
    check(not others or not getattr(pixels, field), field, getattr(pixels, field),
          f"left out: it does not move {' and '.join(others)}")

  def to_float(image):
    """uint8 [b, h, w, c] -> float32 in [0, 1]."""
    if image.dtype != jnp.uint8:
      raise ValueError(f'batch["image"] must be uint8, not {image.dtype}')
    if image.shape[1:3] != view.image_size:
      raise ValueError(f'batch["image"] is {image.shape[1:3]}, not cut to {section}.image_size = '
                       f"{view.image_size}")
    for field, value in dict(mean=mean, std=std).items():
      check(value.size in (1, image.shape[-1]), field, value.ravel().tolist(),
            f"one value, or one for each of the images' {image.shape[-1]} channels")
    return image.astype(jnp.float32) / 255

  def train(rng, batch):
    image_key, mix_key = jax.random.split(rng)
    keys = jax.random.split(image_key, len(batch["image"]))
    examples = {"image": to_float(batch["image"])} | {name: batch[name] for name in others}
    batch = batch | jax.vmap(functools.partial(
      random_example, pixels=pixels, others=others, layers=layers))(keys, examples)
    if not (pixels.mixup or pixels.cutmix):
      return batch
    from input_pipeline import mixing
    image = jax.lax.optimization_barrier(batch["image"])  # or two uses in `mix` compute it twice
    return mixing.mix(mix_key, {**batch, "image": image}, pixels.mixup, pixels.cutmix,
                      pixels.mix_prob, pixels.mix_size, pixels.mix_partner)

  def evaluate(batch):
    return {**batch, "image": (to_float(batch["image"]) - mean[None]) / std[None]}

  return Augment(train, evaluate, lambda image: np.asarray(image) * std + mean)


def make(*, second_view: Mapping | None = None, batch_size: int | None = None,
         features: Mapping = {}, **fields: (geometry.View, Pixels)) -> Augment:
  """The recipe of `config.augment`: one view of each image, or two for contrastive learning.

  Args:
    second_view: None, or a dict, maybe empty, of the fields in which the recipe of a second view,
      "image_2" [b, H, W, c] of training batches, differs; it may have a size of its own. It comes
      cut as "image_2", or, where nothing is cut, is another view of "image".
    batch_size: examples of a training batch, if known, to check mix_size before anything runs.
    features: of the batches, {name: records.Feature}: what lies on an image moves with it.
    **fields: of `geometry.View`, by which images come cut to image_size; and of `Pixels`.
  Raises:
    ValueError: as these; a field of second_view is named augment.second_view.FIELD.
  """
  others = {name: feature.kind for name, feature in features.items()
            if name != "image" and is_moved(feature)}

  def one(section, fields):
    cut = {name: value for name, value in fields.items() if name in geometry.View._fields}
    pixels = Pixels(**{name: value for name, value in fields.items() if name not in cut})
    return one_view(section, geometry.view(section, **cut), pixels, others)

  check = functools.partial(geometry.check, "augment")
  check(fields.get("image_size") is not None, "image_size", None, "given")
  first = one("augment", fields)
  if batch_size and fields.get("mix_size") and (fields.get("mixup") or fields.get("cutmix")):
    from input_pipeline import mixing
    mixing.check_mix_size(fields["mix_size"], batch_size)
  if second_view is None:
    return first
  from input_pipeline import two_views
  two_views.check(second_view, fields, {*geometry.View._fields, *Pixels._fields})
  return two_views.join(first, one("augment.second_view", fields | dict(second_view)),
                        ("image", *others))
