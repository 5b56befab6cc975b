"""What a masked autoencoder fills in: one figure, and its error in pixels."""

import math
import textwrap

import einops
import jax
import numpy as np
from matplotlib.figure import Figure

COLUMNS = ("original", "masked", "reconstruction", "reconstruction and\nvisible patches")


def evaluate(context, examples=8, prediction="reconstruct"):
  """Reconstructs the first `examples` images of the evaluation split and draws them.

  The masks depend on the seed alone, so that figures of different steps compare. Where the output
  has `norm_pix` [B] and it is true, `image` was given each true patch's mean and variance, which
  flatters it; the caption says so.

  Writes:
    `context.figures / reconstruction_step{step:08d}.png`, a row for each image.

  Returns:
    mse: over the removed patches of these images, pixels in [0, 1], predictions not clipped.
    psnr: -10 log10(mse), dB.

  Raises:
    ValueError: `examples` below 1.
  """
  if examples < 1:
    raise ValueError(f"evals.reconstruction.examples={examples} must be at least 1")
  pixels, batch = context.collect(
      "pixels", context.eval_split, "image", params=None, limit=examples)
  images = pixels.reshape(batch["image"].shape)  # b h w c
  out = context.predict(prediction, {"image": images}, jax.random.key(context.seed))

  original, predicted = context.to_pixels(images), context.to_pixels(out["image"])
  removed = mask_image(out["mask"], *images.shape[1:3])  # b h w 1
  square = (predicted - original)**2 * removed
  mse = float(np.sum(square) / (np.sum(removed) * images.shape[-1]))
  psnr = -10 * math.log10(max(mse, 1e-12))

  caption = (f"Step {context.step}, {context.eval_split}: {np.mean(out['mask']):.0%} of the "
             f"patches removed (grey). On these: MSE {mse:.4f}, PSNR {psnr:.1f} dB.")
  caption += (" No loss is on visible patches, so what the reconstruction has there means nothing; "
              "the last column shows the true ones.")
  if np.any(out.get("norm_pix", False)):
    caption += (" Reconstruction: predicted patches, each given its true patch's mean and "
                "variance (the targets were patch-normalised).")
  columns = (original, np.where(removed, 0.5, original), predicted,
             np.where(removed, predicted, original))
  figure = grid(columns, COLUMNS, caption)
  context.figures.mkdir(parents=True, exist_ok=True)
  figure.savefig(context.figures / f"reconstruction_step{context.step:08d}.png", dpi=150)
  return {"mse": mse, "psnr": psnr}


def mask_image(mask, height, width):
  """Row-major patch mask [B, N] (1 = removed) as bool [B, height, width, 1], square patches."""
  p = math.isqrt(height * width // mask.shape[1])
  return einops.repeat(mask > 0, "b (h w) -> b (h p) (w q) 1", h=height // p, p=p, q=p)


def grid(columns, titles, caption):
  """Figure with one column of images [B, H, W, C] in [0, 1] for each title, caption below."""
  rows, size, foot = len(columns[0]), 1.4, 0.9  # inches
  figure = Figure((size * len(columns), size * rows + foot), layout="constrained")
  axes = figure.subplots(rows, len(columns), squeeze=False)
  for column, images, title in zip(axes.T, columns, titles, strict=True):
    column[0].set_title(title, fontsize=8)
    for axis, image in zip(column, images, strict=True):
      grey = image.shape[-1] == 1
      axis.imshow(np.clip(image[..., 0] if grey else image, 0, 1), cmap="gray", vmin=0, vmax=1,
                  interpolation="nearest")
      axis.set(xticks=[], yticks=[])
      axis.spines[:].set(linewidth=0.3)  # shows where an image ends on white paper
  figure.supxlabel(textwrap.fill(caption, 22 * len(columns)), fontsize=8)
  return figure
