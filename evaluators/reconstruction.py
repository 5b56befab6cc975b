"""What a masked autoencoder fills in: one figure, and its error in pixels."""

import math
import textwrap

import einops
import jax
import numpy as np
from matplotlib.figure import Figure

from evaluators import checks

COLUMNS = ("original", "masked", "reconstruction", "reconstruction and\nvisible patches")


def check(facts, examples, prediction, ratios):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, examples, ratios)
  checks.has_split(facts)
  checks.has_prediction(facts, prediction, field="prediction")


def ranges(evaluator: str, examples: int, ratios):
  checks.at_least(evaluator, examples=(examples, 1))
  checks.tuple_of(evaluator, "ratios", ratios, "numbers in (0, 1)", lambda x: 0 < x < 1, least=0)


def evaluate(context, examples: int = 8, prediction: str = "reconstruct",
             ratios: tuple[float, ...] = ()):
  """Reconstructs the first `examples` images of the evaluation split and draws them.

  The masks depend on the seed alone, so that figures of different steps compare. Where the output
  has `norm_pix` [B] and it is true, `image` was given each true patch's mean and variance, which
  flatters it; the caption says so.

  Args:
    examples: how many.
    prediction: what reconstructs; given "keep" [B, M], from the patches in it.
    ratios: a second figure has these shares of the patches removed, such as (0.5, 0.75, 0.9), at
      random however the training removed them: the more, the more of the same patches.

  Writes:
    `context.figures / reconstruction_step{step:08d}.png`, a row for each image.
    `context.figures / reconstruction_ratios_step{step:08d}.png`, with `ratios`.

  Returns:
    mse: over the removed patches of these images, pixels in [0, 1], predictions not clipped.
    psnr: -10 log10(mse), dB.
    {ratio}/mse, {ratio}/psnr: the same for each of `ratios`.

  Raises:
    ValueError: `examples` below 1, a ratio that leaves no patch or removes none.
  """
  ranges("reconstruction", examples, ratios)
  pixels, batch = context.collect(
      "pixels", context.eval_split, "image", params=None, first=examples)
  images = pixels.reshape(batch["image"].shape)  # b h w c
  out = context.predict(prediction, {"image": images}, jax.random.key(context.seed))
  original = context.to_pixels(images)
  predicted, removed, mse, psnr = judge(context, out, original)
  columns = (original, np.where(removed, 0.5, original), predicted,
             np.where(removed, predicted, original))
  figures = {"reconstruction": grid(columns, COLUMNS, caption(context, out, mse, psnr))}
  metrics = {"mse": mse, "psnr": psnr}
  if ratios:
    figures["reconstruction_ratios"], more = at_ratios(
      context, prediction, images, original, ratios, out["mask"].shape[1])
    metrics |= more
  context.figures.mkdir(parents=True, exist_ok=True)
  for name, figure in figures.items():
    figure.savefig(context.figures / f"{name}_step{context.step:08d}.png", dpi=150)
  return metrics


def judge(context, out, original):
  """What a reconstruction `out` of images [b, h, w, c] in [0, 1] is worth.

  (predicted pixels, which are removed bool [b, h, w, 1], mse, psnr).
  """
  predicted = context.to_pixels(out["image"])
  removed = mask_image(out["mask"], *original.shape[1:3])
  square = (predicted - original)**2 * removed
  mse = float(np.sum(square) / (np.sum(removed) * original.shape[-1]))
  return predicted, removed, mse, -10 * math.log10(max(mse, 1e-12))


def caption(context, out, mse: float, psnr: float) -> str:
  text = (f"Step {context.step}, {context.eval_split}: {np.mean(out['mask']):.0%} of the patches "
          f"removed (grey). On these: MSE {mse:.4f}, PSNR {psnr:.1f} dB. No loss is on visible "
          "patches, so what the reconstruction has there means nothing; the last column shows the "
          "true ones.")
  if np.any(out.get("norm_pix", False)):
    text += (" Reconstruction: predicted patches, each given its true patch's mean and variance "
             "(the targets were patch-normalised).")
  return text


def at_ratios(context, prediction: str, images, original, ratios, patches: int):
  """(the figure of `images` with these shares of their patches removed, its numbers)."""
  order = np.random.default_rng(context.seed).random((len(images), patches)).argsort(1)  # b n
  columns, titles, metrics = [original], ["original"], {}
  for ratio in ratios:
    kept = int(patches * (1 - ratio))
    if not 0 < kept < patches:
      raise ValueError(f"evals.reconstruction.ratios: {ratio} must leave at least one of {patches} "
                       "patches and remove at least one")
    out = context.predict(prediction, {"image": images, "keep": order[:, :kept]},
                          jax.random.key(context.seed))
    predicted, removed, mse, psnr = judge(context, out, original)
    columns += [np.where(removed, 0.5, original), np.where(removed, predicted, original)]
    titles += [f"{ratio:.0%} removed", f"filled in\nPSNR {psnr:.1f} dB"]
    metrics |= {f"{ratio:g}/mse": mse, f"{ratio:g}/psnr": psnr}
  return grid(columns, titles, (
    f"Step {context.step}, {context.eval_split}: the same images with more and more patches "
    "removed, and these as predicted among the true ones.")), metrics


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
