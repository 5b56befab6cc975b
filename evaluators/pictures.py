"""Images side by side as figures, and maps of patches over images."""

import textwrap

import matplotlib
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from evaluators import checks


def rgb(image):
  """Images in [0, 1], of any channels, as [..., h, w, 3]; of more than three the first."""
  image = np.clip(image[..., :3] if image.shape[-1] >= 3 else image[..., :1], 0, 1)
  return np.broadcast_to(image, (*image.shape[:-1], 3))


def grid(n: int, h: int, w: int) -> tuple[int, int]:
  """Rows and columns of the n patches of an image of h x w pixels, as square as may be."""
  rows = min((a for a in range(1, n + 1) if n % a == 0), key=lambda a: abs(a * a * w - n * h))
  return rows, n // rows


def enlarge(patches, size: tuple[int, int]):
  """Values of patches [..., h, w, c] as images of (height, width) pixels."""
  row, column = (np.arange(a) * b // a for a, b in zip(size, patches.shape[-3:-1]))
  return patches[..., row[:, None], column[None], :]


def heat(image, amount):
  """Images [b, h, w, 3], and beside each itself under c maps: [b, 1 + c, h, w, 3].

  Args:
    amount: maps of patches [b, c, h', w'], each coloured from 0, black, over purple and orange to
      its largest value, yellow.
  """
  amount = amount / np.maximum(amount.max((-2, -1), keepdims=True), 1e-12)
  colour = enlarge(matplotlib.colormaps["inferno"](amount)[..., :3], image.shape[1:3])
  return np.concatenate([image[:, None], 0.3 * image[:, None] + 0.7 * colour], axis=1)


def mosaic(cells, columns, rows, caption: str, cell: float = 1.1):
  """One figure of images [r, c, h, w, 3] in [0, 1], with titles of columns and names of rows."""
  r, c, h, w, _ = cells.shape
  gap = max(1, h // 16)
  canvas = np.pad(cells, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=1)
  canvas = rearrange(canvas, "r c h w d -> (r h) (c w) d")[:-gap, :-gap]
  width = max(c * cell, 3.5)
  wrapped = textwrap.wrap(caption, int(15 * (width + 0.6)))
  figure = Figure((width + 0.6, r * cell * h / w * width / (c * cell) + 0.3 + 0.16 * len(wrapped)),
                  layout="constrained")
  axis = figure.subplots()
  axis.imshow(canvas, interpolation="nearest")
  for set_ticks, side, names in ((axis.set_xticks, w, columns), (axis.set_yticks, h, rows)):
    middle = np.arange(len(names)) * (side + gap) + side / 2
    set_ticks(middle, names, fontsize=8, parse_math=False)
  axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
  axis.spines[:].set_visible(False)
  figure.supxlabel("\n".join(wrapped), fontsize=8)
  return figure


def applying(evaluator: str, predictions, figures, needs) -> tuple[str, ...]:
  """The figures, of `needs` {figure: its prediction}, that are asked for (None: all) and can be.

  Raises ValueError where one of them is not known or cannot be drawn, or none is left.
  """
  figures = (figures,) if isinstance(figures, str) else figures
  checks.all_known(evaluator, "figures", figures or (), needs)
  for name in figures or ():
    if needs[name] not in predictions:
      raise ValueError(f"evals.{evaluator}.figures: {name!r} needs the prediction "
                       f"{needs[name]!r}, which this method has not on this network")
  found = tuple(name for name in needs if needs[name] in predictions and (
    figures is None or name in figures))
  if not found:
    raise ValueError(f"evals.{evaluator}: none of its figures applies; they need one of the "
                     f"predictions {', '.join(sorted(set(needs.values())))}")
  return found
