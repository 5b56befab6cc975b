"""A look inside a network: figures of its attention, positions, filters, tokens and features."""

import math
import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from evaluators import checks, distances, pictures, retrieval

NEEDS = {  # figure -> the prediction that it shows
  "attention": "attention_layers", "rollout": "attention_layers", "distance": "attention_layers",
  "positions": "positions", "filters": "filters", "tokens": "tokens", "neighbours": "features"}


# --- What is shown --------------------------------------------------------------------------------

def rollout(weights):
  """Attention rollout (2005.00928 sec. 3): how block after block mixes the input's tokens.

  The mean over heads is averaged with the identity, for the residual branch, and multiplied on.

  Args:
    weights: [b, depth, k, q, q], the last axis sums to 1.

  Returns:
    [b, depth, q, q]: after each block, what share each token has of each token of the input.
  """
  mixed = 0.5 * weights.mean(2) + 0.5 * np.eye(weights.shape[-1])            # b depth q q
  rolled = [mixed[:, 0]]
  for layer in range(1, mixed.shape[1]):
    rolled.append(mixed[:, layer] @ rolled[-1])
  return np.stack(rolled, axis=1)


def mean_distance(weights, grid: tuple[int, int], patch: float):
  """Mean attention distance in pixels (2010.11929 appendix D.7), [..., n, n] -> [...].

  Of a query patch, the distances to all patches' centres weighted by attention; then the mean over
  queries. Attention to other tokens than patches is left out of the weighting.

  Args:
    weights: of query patches (n) to key patches (n), row-major on `grid`.
    grid: patches (h, w).
    patch: pixels a side.
  """
  place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2) * patch
  distance = np.linalg.norm(place[:, None] - place[None], axis=-1)           # n n
  return (np.einsum("...qn,qn->...q", weights, distance) / weights.sum(-1)).mean(-1)


def principal_components(x, count: int):
  """The first principal components of examples x [m, d], in float64.

  Returns:
    (scores [m, count], components [count, d], share of the variance [count]), zeros where there are
    no more. The sign is such that a component's largest entry is positive.
  """
  x = np.asarray(x, np.float64)
  x = x - x.mean(0)
  _, s, components = np.linalg.svd(np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x,
                                   full_matrices=False)
  components = np.pad(components[:count], ((0, max(count - len(components), 0)), (0, 0)))
  largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
  components = components * np.where(largest < 0, -1, 1)
  share = np.pad(s[:count]**2, (0, max(count - len(s), 0))) / max((s**2).sum(), 1e-30)
  return x @ components.T, components, share


def colours(tokens):
  """Three principal components of tokens [m, d] as red, green and blue: [m, 3] in [0, 1]."""
  scores = principal_components(tokens, 3)[0]
  low, high = np.percentile(scores, (1, 99), axis=0)
  return np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)


def differences(tokens):
  """`colours` of what tokens [b, n, d] have beyond the means of their image and of their place.

  The hue is the components', the brightness (largest of red, green, blue) the length: a patch like
  others, as those of a background are, is dark. [b, n, 3].
  """
  tokens = tokens - tokens.mean(0, keepdims=True)
  tokens = tokens - tokens.mean(1, keepdims=True)
  length = np.linalg.norm(tokens, axis=-1, keepdims=True)
  hue = colours(rearrange(tokens, "b n d -> (b n) d")).reshape(*length.shape[:2], 3) + 0.05
  brightness = np.clip(length / np.maximum(np.percentile(length, 95), 1e-12), 0, 1)
  return hue / hue.max(-1, keepdims=True) * brightness


# --- Figures --------------------------------------------------------------------------------------

def distance_figure(values, uniform: float, caption: str):
  """Mean attention distances [depth, k] in pixels, a dot for each head."""
  depth, heads = values.shape
  figure = Figure((5, 3.8), layout="constrained")
  axis = figure.subplots()
  axis.axhline(uniform, color="tab:gray", linestyle="--", linewidth=1,
               label="if all patches were attended alike")
  axis.plot(np.repeat(np.arange(1, depth + 1), heads), values.reshape(-1), "o", markersize=5,
            alpha=0.6, label="a head")
  axis.plot(np.arange(1, depth + 1), values.mean(1), color="tab:orange", label="mean of heads")
  axis.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
  axis.xaxis.get_major_locator().set_params(integer=True)
  axis.legend(fontsize=8)
  figure.supxlabel(textwrap.fill(caption, 75), fontsize=8)
  return figure


def positions_figure(table, grid: tuple[int, int], caption: str, most: int = 16):
  """Cosine similarity of position embeddings [n, d]: a map over the grid for each (every s-th)."""
  unit = checks.unit(np.asarray(table, np.float64))
  similar = rearrange(unit @ unit.T, "(a b) (h w) -> a b h w", a=grid[0], h=grid[0])
  step = -(-max(grid) // most)
  similar = similar[step // 2::step, step // 2::step]                        # a b h w
  norm = matplotlib.colors.Normalize(similar.min(), 1)
  cells = matplotlib.colormaps["viridis"](norm(similar))[..., :3]
  figure = pictures.mosaic(
    pictures.enlarge(cells, [side * -(-24 // side) for side in grid]),
    np.arange(grid[1])[step // 2::step] + 1, np.arange(grid[0])[step // 2::step] + 1, caption,
    cell=max(0.45, 4 / len(similar)))
  figure.colorbar(matplotlib.cm.ScalarMappable(norm, "viridis"), ax=figure.axes[0], shrink=0.8,
                  label="cosine similarity")
  return figure


def filters_figure(filters, caption: str, columns: int = 8):
  """Filters [m, p, p, c], each from dark over grey, which is 0, to light by its largest weight."""
  cells = 0.5 + 0.42 * filters / np.maximum(np.abs(filters).max((1, 2, 3), keepdims=True), 1e-12)
  larger = [side * -(-32 // side) for side in cells.shape[1:3]]
  cells = pictures.enlarge(pictures.rgb(cells), larger)
  cells = np.pad(cells, [(0, -len(cells) % columns), *[(0, 0)] * 3], constant_values=1)
  return pictures.mosaic(rearrange(cells, "(r c) h w d -> r c h w d", c=columns), (), (), caption)


def neighbours_figure(queries, query_names, found, found_names, right, scores, caption: str):
  """Each query image [b, h, w, 3] with images found [b, k, h, w, 3], `right` [b, k] in green."""
  rows, k = scores.shape
  figure = Figure((1.1 * (k + 1) + 0.3, 1.3 * rows + 0.4), layout="constrained")
  axes = figure.subplots(rows, k + 2, squeeze=False, width_ratios=[1, 0.2, *[1] * k])
  for line, query, name, row in zip(axes, queries, query_names, range(rows)):
    retrieval.show(line[0], query, name)
    line[1].axis("off")
    for j, axis in enumerate(line[2:]):
      retrieval.show(axis, found[row, j], f"{found_names[row][j]}  {scores[row, j]:.2f}",
                     retrieval.RIGHT if right[row, j] else None)
  figure.supxlabel(textwrap.fill(caption, 15 * (k + 1)), fontsize=8)
  return figure


def check(facts, figures, features, split, **numbers):
  """Raises ValueError on what `evaluate` would stumble over."""
  applying(facts.name, facts.predictions, figures, features, **numbers)
  checks.has_split(facts, split)


def applying(evaluator: str, predictions, figures, features: str, **numbers) -> tuple[str, ...]:
  """The figures that are asked for and can be drawn. Raises ValueError, on bad numbers too."""
  checks.at_least(evaluator, **{name: (value, 1) for name, value in numbers.items()})
  return pictures.applying(evaluator, predictions, figures, {**NEEDS, "neighbours": features})


def evaluate(context, figures: tuple[str, ...] | None = None, examples: int = 6,
             images: int = 128, neighbours: int = 8, features: str = "features",
             split: str | None = None, limit: int | None = 5000):
  """Draws what a network has learnt, over images of one split; no numbers.

  Figures:
    attention: of the last block, a map for each head: what the features' query attends to, which
      is the class token where it is pooled, else the mean of the patches (2104.14294 fig. 1).
    rollout: `rollout` of that query, after up to eight of the blocks.
    distance: `mean_distance` of each block's heads (2010.11929 fig. 7 right).
    positions: similarity of position embeddings, fixed ones too (2010.11929 fig. 7 centre).
    filters: principal components of a ViT's patch filters (2010.11929 fig. 7 left); of a ResNet the
      filters of its stem.
    tokens: `colours` of the last layer's patches, and of their `differences`.
    neighbours: images with the training images of the most similar features, by cosine.

  Args:
    figures: names of those; None = all that apply: the first four need a ViT, `positions` one that
      has them, `filters`, `tokens` and `neighbours` any network of images.
    examples: images that are shown, spread over those that are read.
    images: how many are read, spread over the split; distances and components are over them.
    neighbours: training images beside each.
    features: the prediction whose neighbours they are.
    split: which; None = the evaluation split.
    limit: training images that neighbours are among, spread over the split; None = all. They are
      held in memory.

  Writes:
    `context.figures / inside_{name}_step{step:08d}.png`.

  Raises:
    ValueError: numbers out of range, no such figure, or one that does not apply.
  """
  figures = applying("inside", context.predictions, figures, features, examples=examples,
                     images=images, neighbours=neighbours, limit=limit)
  context.figures.mkdir(parents=True, exist_ok=True)
  for name, figure in draw(context, figures, examples, images, neighbours, features,
                           split or context.eval_split, limit):
    figure.savefig(context.figures / f"inside_{name}_step{context.step:08d}.png", dpi=150)
  return {}


class Seen(NamedTuple):
  """The images of a split that are read, and those of them that figures show."""

  where: str  # the start of a caption
  keys: tuple[str, ...]  # features to collect beside a prediction
  batch: dict  # "image" [b, h, w, c] as the network sees it, and "label" [b] where there are labels
  shown: np.ndarray  # int [s], which of them
  pixels: np.ndarray  # [s, h, w, 3] in [0, 1]
  names: np.ndarray  # of their classes, [s]


def names_of(context, batch, chosen):
  """Names of the classes of `chosen` examples, any shape; "" where there are no labels."""
  if "label" not in batch:
    return np.full(np.shape(chosen), "")
  every = context.info.class_names or range(context.info.num_classes)
  return np.array([retrieval.fold(str(name), 14, 1) for name in every])[batch["label"][chosen]]


def read(context, split: str, images: int, examples: int) -> Seen:
  keys = ("image", "label") if context.info.num_classes else ("image",)
  _, batch = context.collect("pixels", split, *keys, params=None, limit=images)
  shown = np.unique(np.linspace(0, len(batch["image"]) - 1, examples).round().astype(int))
  pixels = pictures.rgb(context.to_pixels(batch["image"][shown]))
  return Seen(f"Step {context.step}, {split}", keys, batch, shown, pixels,
              names_of(context, batch, shown))


def draw(context, figures, examples, images, neighbours, features, split, limit):
  """Yields (name, figure); `evaluate` describes the arguments."""
  seen = read(context, split, images, examples)
  if {"attention", "rollout", "distance"} & set(figures):
    yield from draw_attention(context, seen, figures)
  if "positions" in figures:
    yield "positions", draw_positions(context, seen)
  if "filters" in figures:
    yield "filters", draw_filters(context)
  if "tokens" in figures:
    tokens = context.collect("tokens", split, limit=images)[0].astype(np.float32)  # b n d
    yield "tokens", draw_tokens(seen, tokens)
  if "neighbours" in figures:
    queries = context.collect(features, split, limit=images)[0][seen.shown]  # s d
    yield "neighbours", draw_neighbours(context, seen, queries, features, neighbours, limit)


def draw_attention(context, seen: Seen, figures):
  """Yields what of "attention", "rollout" and "distance" is in `figures`."""
  last, rolled, values, uniform = attention(context, seen.batch["image"], seen.shown)
  colours_are = "From black over purple and orange to yellow: from 0 to the most of a patch."
  if "attention" in figures:
    heads = [f"head {i + 1}" for i in range(last.shape[1])]
    yield "attention", pictures.mosaic(
      pictures.heat(seen.pixels, last), ["image", *heads], seen.names, (
        f"{seen.where}: what the last block's heads attend to, by the query of the features. "
        + colours_are))
  if "rollout" in figures:
    chosen = np.unique(np.linspace(0, len(values) - 1, 8).round().astype(int))
    blocks = [f"block {i + 1}" for i in chosen]
    yield "rollout", pictures.mosaic(
      pictures.heat(seen.pixels, rolled[:, chosen]), ["image", *blocks], seen.names, (
        f"{seen.where}: attention rollout, what the features take from each patch through all "
        f"blocks up to the one named. {colours_are}"))
  if "distance" in figures:
    b, h, w, _ = seen.batch["image"].shape
    yield "distance", distance_figure(values, uniform, (
      f"{seen.where}: mean over {b} images of {h} x {w} pixels."))


def draw_positions(context, seen: Seen):
  table = context.predict("positions", {})
  grid = pictures.grid(len(table), *seen.pixels.shape[1:3])
  return positions_figure(table, grid, (
    f"Step {context.step}: position embeddings. The map at row i, column j: similarity of patch "
    f"(i, j) to all of the {grid[0]} x {grid[1]}."))


def draw_filters(context):
  filters = context.predict("filters", {})
  if "attention_layers" not in context.predictions:
    return filters_figure(filters[:64], (
      f"Step {context.step}: filters of the stem, {len(filters[:64])} of {len(filters)}."))
  count = min(28, len(filters) - 1, filters[0].size)
  _, components, share = principal_components(filters.reshape(len(filters), -1), count)
  return filters_figure(components.reshape(-1, *filters.shape[1:]), (
    f"Step {context.step}: principal components of the {len(filters)} patch filters, row by "
    f"row; these make {share.sum():.0%} of the variance, the first {share[0]:.0%}."), columns=7)


def draw_tokens(seen: Seen, tokens):
  every = colours(rearrange(tokens, "b n d -> (b n) d")).reshape(*tokens.shape[:2], 3)
  cells = np.stack([every[seen.shown], differences(tokens)[seen.shown]])     # 2 s n 3
  size = seen.pixels.shape[1:3]
  cells = cells.reshape(*cells.shape[:2], *pictures.grid(tokens.shape[1], *size), 3)
  cells = np.concatenate([seen.pixels[None], pictures.enlarge(cells, size)])
  return pictures.mosaic(cells, seen.names, ("image", "patches", "differences"), (
    f"{seen.where}: the first three principal components of the patches of {len(tokens)} images as "
    "red, green and blue. Differences: of what a patch has beyond the means of its image and of "
    "its place, dark where that is little."))


def draw_neighbours(context, seen: Seen, queries, features: str, neighbours: int, limit):
  """Images shown, of features `queries` [s, d], with the training images nearest to each."""
  bank, train = context.collect(features, context.train_split, *seen.keys, limit=limit)
  queries, unit = (checks.unit(x.astype(np.float32)) for x in (queries, bank))
  place = np.asarray(distances.nearest(queries, unit, min(neighbours, len(bank)))[1])  # s k
  found = pictures.rgb(context.to_pixels(train["image"][place.reshape(-1)]))
  right, note = np.zeros(place.shape, bool), ""
  if "label" in train:
    right = train["label"][place] == seen.batch["label"][seen.shown][:, None]
    note = " Green: of the same class."
  return neighbours_figure(
    seen.pixels, seen.names, found.reshape(*place.shape, *found.shape[1:]),
    names_of(context, train, place), right, np.einsum("bd,bkd->bk", queries, unit[place]), (
      f"{seen.where}: left an image, then the most similar of {len(bank)} training images by the "
      "cosine of their features." + note))


def attention(context, ready, shown, size: int = 8):
  """What of the attention to `ready` images is drawn, from `size` of them at a time.

  Returns:
    (last block's maps [s, k, h, w] and rollouts [s, depth, h, w] of images `shown`, mean distances
    [depth, k] of all, the distance if attention was uniform).
  """
  last, rolled, values = [], [], []
  for start in range(0, len(ready), size):
    chosen = np.arange(start, min(start + size, len(ready)))
    out = context.predict("attention_layers",
                          {"image": ready.take(range(start, start + size), axis=0, mode="clip")})
    weights, prefix = out["weights"][:len(chosen)], out["prefix"][0]
    grid = pictures.grid(weights.shape[-1] - prefix, *ready.shape[1:3])
    patch = ready.shape[1] / grid[0]                                         # pixels a side
    values.append(mean_distance(weights[..., prefix:, prefix:], grid, patch))
    mine = np.isin(chosen, shown)
    for parts, maps in ((last, weights[mine][:, -1]), (rolled, rollout(weights[mine]))):
      maps = np.einsum("bq,b...qn->b...n", out["shares"][:len(chosen)][mine], maps)
      parts.append(maps[..., prefix:].reshape(*maps.shape[:-1], *grid))
  n = math.prod(grid)
  return (np.concatenate(last), np.concatenate(rolled), np.concatenate(values).mean(0),
          float(mean_distance(np.ones((n, n)), grid, patch)))
