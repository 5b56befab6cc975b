"""Masked autoencoding (2111.06377): predict the pixels of removed patches."""

import math
from typing import Literal

import jax.numpy as jnp

from losses import reconstruction
from methods.image_predictions import image_predictions
from methods.method import Method
from models.mae import MASKING, mask_from_keep, mask_from_noise
from models.vit import patchify, unpatchify


def target(image, patch: int, norm_pix: bool):
  """What is predicted of images [b, h, w, c]: patches [b, n, p*p*c] (2111.06377 sec. 3).

  With `norm_pix` standardised by each patch's own mean and standard deviation.
  """
  pixels = patchify(image, patch)
  if norm_pix:
    mean, std = reconstruction.patch_statistics(pixels)
    pixels = (pixels - mean) / std
  return pixels


def image_of(pred, image, patch: int, norm_pix: bool):
  """The image that predicted patches stand for: the inverse of `target`, of a true image."""
  pixels = pred.astype(jnp.float32)
  if norm_pix:
    mean, std = reconstruction.patch_statistics(patchify(image, patch))
    pixels = pixels * std + mean
  return unpatchify(pixels, patch, grid_of(image, patch))


def grid_of(image, patch: int) -> tuple[int, int]:
  return image.shape[1] // patch, image.shape[2] // patch


def make(model, *, mask_ratio: float = 0.75, masking: Literal[*MASKING] = "random",
         norm_pix: bool = True) -> Method:
  """An encoder-decoder `models.mae.MAE` learns to fill in images.

  Args:
    model: the network.
    mask_ratio: share of patches removed, in (0, 1).
    masking: a name in `models.mae.MASKING`.
    norm_pix: whether targets are standardised by their own patch's statistics.
  """
  encoder = model.encoder
  patch, patches = encoder.patch, encoder.grid[0] * encoder.grid[1]
  if not 0 < mask_ratio < 1 or not 0 < int(patches * (1 - mask_ratio)) < patches:
    raise ValueError(f"method.mask_ratio = {mask_ratio}: expected a number in (0, 1) that leaves "
                     f"at least one of {patches} patches and removes at least one")

  def draw(rng, batch):
    if "noise" in batch:
      return batch
    image = batch["image"]
    return {**batch, "noise": MASKING[masking](rng, image.shape[0], grid_of(image, patch))}

  def init(rng, batch):
    keep, restore, _ = mask_from_noise(draw(rng, batch)["noise"], mask_ratio)
    return model.init(rng, batch["image"], keep, restore)["params"], {}

  def forward(params, batch, rng, train):
    if "keep" in batch:
      keep, restore, mask = mask_from_keep(batch["keep"], math.prod(grid_of(batch["image"], patch)))
    else:
      keep, restore, mask = mask_from_noise(draw(rng, batch)["noise"], mask_ratio)
    pred = model.apply({"params": params}, batch["image"], keep, restore, train=train,
                       rngs={"dropout": rng, "drop_path": rng} if train else {})
    return pred, mask

  def loss(params, extra, batch, rng, step):
    pred, mask = forward(params, batch, rng, train=True)
    error = reconstruction.masked_mse(pred, target(batch["image"], patch, norm_pix), mask)  # b
    return error.mean(), (extra, {})

  def reconstruct(params, extra, batch, rng):
    """`image` is the prediction in the input's units, by the true patches' statistics if needed.

    Where the batch has "keep", int [b, m], these patches are visible, however many.
    """
    pred, mask = forward(params, batch, rng, train=False)
    return {"pred": pred, "mask": mask, "image": image_of(pred, batch["image"], patch, norm_pix),
            "norm_pix": jnp.full(mask.shape[0], norm_pix)}

  def encode(params, extra, batch, **kwargs):
    return model.apply({"params": params}, batch["image"], method="encode", **kwargs)[1]

  predict = image_predictions(encoder, encode, lambda params: params["encoder"])
  predict["reconstruct"] = reconstruct
  return Method(init, loss, predict, draw, needs=("image",))
