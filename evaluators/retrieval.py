"""Recall of image-text retrieval, both ways, and two figures that show it."""

import functools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from evaluators import checks

TOLERANCE = 1e-6  # similarities of unit vectors that differ by less differ by rounding alone
RIGHT = "tab:green"


def embed_text(predict, ids, batch_size=256):
  """Embeds token ids [n, l] as [n, D], in batches of one size.

  `predict` is (name, batch) -> NumPy outputs: an evaluator context's or a loaded run's.
  """
  size = min(batch_size, len(ids))
  padded = np.pad(ids, ((0, -len(ids) % size), (0, 0)), mode="edge")
  return np.concatenate([predict("embed_text", {"text": batch})
                         for batch in padded.reshape(-1, size, ids.shape[1])])[:len(ids)]


@functools.partial(jax.jit, static_argnames="block")
def standing(queries, candidates, query, candidate, block):
  """How each query's best right candidate stands, as `recall` needs it.

  Returns:
    int32 [Q] each: right candidates of the best one's similarity, itself included (0 if that is
    NaN, so that it never hits); all candidates of a higher similarity; all that are not lower.
  """
  def paired(pair):
    return jnp.sum(queries[pair[0]] * candidates[pair[1]])

  similarity = jax.lax.map(paired, (query, candidate), batch_size=4096)  # e
  best = jax.ops.segment_max(similarity, query, len(queries))  # q
  right = jax.ops.segment_sum((similarity >= best[query] - TOLERANCE).astype(int), query,
                              len(queries))

  def count(row):
    x, best = row
    s = jnp.matmul(x, candidates.T, precision="highest")  # c
    return jnp.sum(s > best + TOLERANCE), jnp.sum(~(s < best - TOLERANCE))

  above, least = jax.lax.map(count, (queries, best), batch_size=max(1, block // len(candidates)))
  return right, above, least


def recall(queries, candidates, pairs, ks, block=2**24):
  """Share of queries with a right candidate among their k most similar ones, for each k.

  Exact: every query is compared with every candidate. Of equal similarities (to 1e-6, so that
  rounding breaks no tie) all orders are equally likely and a query counts by the share of them in
  which it hits. So constant embeddings score chance, and the order of the data does not matter.

  Args:
    queries, candidates: float32 [Q, D] and [C, D], unit norm.
    pairs: (query, candidate), int [E] each: what is right for what, no pair twice.
    ks: numbers of candidates, >= 1.
    block: similarities held at once, which bounds memory; the default takes about 200 MiB.

  Returns:
    {k: float in [0, 1]}.
  """
  right, above, least = map(np.asarray, standing(queries, candidates, *pairs, block=block))
  tied, draw = least - above, np.arange(max(ks))[:, None]
  # After those above, places are drawn from the tied ones: how likely is the next a wrong one?
  wrong = np.maximum(tied - right - draw, 0) / np.maximum(tied - draw, 1)
  miss = np.cumprod(np.concatenate([np.ones((1, len(queries))), wrong]), axis=0)  # k+1 q
  return {k: float(1 - np.mean(np.take_along_axis(miss, np.maximum(k - above, 0)[None], 0)))
          for k in ks}


def embed_captions(context, captions, num_captions, unique):
  """Embeds the texts that images are looked up by; `evaluate` describes `unique`.

  Args:
    captions: token ids int32 [N, m, l], of which image n has the first num_captions[n].

  Returns:
    (strings [T], embeddings [T, D], (image, text) int [E] each: whose they are, sorted by image).

  Raises:
    ValueError: `unique` does not match a caption.
  """
  present = np.arange(captions.shape[1]) < num_captions[:, None]  # n m
  image = np.nonzero(present)[0]  # e
  rows, row = np.unique(captions[present], axis=0, return_inverse=True)  # r l, e
  row = row.reshape(-1)  # NumPy 2.0 keeps an axis
  strings, embeddings = [context.detokenize(ids) for ids in rows], embed_text(context.predict, rows)
  if unique is None:
    return [strings[r] for r in row], embeddings[row], (image, np.arange(len(row)))
  matches = [re.match(unique, string) for string in strings]
  if None in matches:
    raise ValueError(f"evals.retrieval.unique={unique!r} does not match the caption "
                     f"{strings[matches.index(None)]!r}")
  names, group = np.unique([match[0] for match in matches], return_inverse=True)
  mean = np.zeros((len(names), embeddings.shape[1]), np.float32)
  np.add.at(mean, group, embeddings)
  return list(names), checks.unit(mean), np.unique([image, group[row]], axis=1)


def check(facts, split, ks, limit, unique, examples, gallery):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, ks, limit, unique, examples, gallery)
  checks.has_texts(facts.name, facts)
  checks.has_split(facts, split)
  checks.has_prediction(facts, "embed_image", "embed_text")


def ranges(evaluator: str, ks, limit, unique: str | None, examples: int, gallery: int):
  checks.at_least(evaluator, limit=(limit, 1), examples=(examples, 0), gallery=(gallery, 1))
  checks.counts(evaluator, "ks", ks)
  try:
    re.compile(unique or "")
  except re.error as error:
    raise ValueError(f"evals.{evaluator}.unique={unique!r} is no regular expression: {error}"
                     ) from error


def evaluate(context, split: str | None = None, ks: tuple[int, ...] = (1, 5, 10),
             limit: int | None = None, unique: str | None = None, examples: int = 5,
             gallery: int = 256):
  """Recall at k of image-to-text and text-to-image retrieval, in [0, 1].

  An image has found its text if ANY of its captions is among its k best; every caption is a query
  for its image. As CLIP papers do, a caption of another image is wrong even if it says the same:
  unless `unique` is set, which makes one candidate of captions that agree.

  Args:
    split: which; None = the evaluation split.
    ks: the numbers k; ties count as `recall` says.
    limit: how many examples, spread over the split; None = all.
    unique: a regular expression: captions in which it matches the same beginning are one text,
      right for all images that have one of them, with the mean of their embeddings. ".*" merges
      equal captions; "[^,]*" what is equal up to a comma, so that of glyphs each name is one text
      in all its styles. None = every caption is its own.
    examples: queries that the figures show; 0 = no figures.
    gallery: the first images of the split, among which the figures search.

  Writes:
    `context.figures / retrieval_step{step:08d}.png`: queries with what they find, both ways.
    `context.figures / similarity_step{step:08d}.png`: each with each of some pairs.

  Returns:
    image_to_text/r{k}, text_to_image/r{k}; chance: what r1 is, either way, if nothing was learnt.

  Raises:
    ValueError: a number out of range, data without captions, a bad `unique`.
  """
  ranges("retrieval", ks, limit, unique, examples, gallery)
  checks.has_texts("retrieval", context)
  split = split or context.eval_split
  images, batch = context.collect("embed_image", split, "captions", "num_captions", limit=limit)
  strings, texts, (image, text) = embed_captions(
      context, batch["captions"], batch["num_captions"], unique)
  metrics = {f"image_to_text/r{k}": r for k, r in
             recall(images, texts, (image, text), ks).items()}
  metrics |= {f"text_to_image/r{k}": r for k, r in
              recall(texts, images, (text, image), ks).items()}
  if examples:
    gallery = min(gallery, len(images))
    shown = np.unique(text[image < gallery])  # t
    right = np.zeros((gallery, len(shown)), bool)
    right[image[image < gallery], np.searchsorted(shown, text[image < gallery])] = True
    pixels, batch = context.collect("pixels", split, "image", params=None, limit=limit,
                                    first=gallery)
    pixels = context.to_pixels(pixels.reshape(batch["image"].shape))  # g h w c
    draw(context, split, images[:gallery] @ texts[shown].T, right,
         pixels, [strings[t] for t in shown], examples)
  return metrics | {"chance": len(image) / (len(images) * len(texts))}


def draw(context, split, scores, right, images, strings, examples):
  """Writes both figures; scores and right are [images, texts], images in [0, 1]."""
  first = np.argmax(right, axis=1)  # each image's first text
  rows = np.sort(np.unique(first, return_index=True)[1])[:examples]  # images of different texts
  where = f"Step {context.step}, {split}: "
  context.figures.mkdir(parents=True, exist_ok=True)
  for name, figure in (
      ("retrieval", grid(scores, right, images, strings, rows, first[rows], where)),
      ("similarity", matrix(scores, right, images, strings, rows, first[rows], where))):
    figure.savefig(context.figures / f"{name}_step{context.step:08d}.png", dpi=150)


def show(axis, image, title="", color=None):
  """Draws one image [h, w, c] in [0, 1], with a thick frame if it has a colour."""
  axis.imshow(np.clip(image[..., 0] if image.shape[-1] == 1 else image, 0, 1), cmap="gray",
              vmin=0, vmax=1, interpolation="nearest")
  axis.axis("on")
  axis.set(xticks=[], yticks=[])
  axis.set_title(title, fontsize=7, pad=3)
  axis.spines[:].set(linewidth=3 if color else 0.3, color=color or "black")


def fold(string, width, lines=3):
  """Breaks a caption into lines, and cuts it after the last."""
  return "\n".join(textwrap.wrap(string, width, max_lines=lines, placeholder=" ...") or [""])


def grid(scores, right, images, strings, rows, columns, where, top=5):
  """A row for each pair: its text and the images it finds; its image and the texts it finds."""
  figure = Figure((13, 1.15 * len(rows) + 0.9), layout="constrained")
  axes = figure.subplots(len(rows), top + 4, squeeze=False,
                         width_ratios=[2.2, *[1] * top, 0.2, 1, 4.9])
  for axis in axes.flat:
    axis.axis("off")
  for line, i, t in zip(axes, rows, columns):
    line[0].text(1, 0.5, fold(strings[t], 24, 4), ha="right", va="center", fontsize=8,
                 parse_math=False, transform=line[0].transAxes)
    for axis, j in zip(line[1:], np.argsort(-scores[:, t], kind="stable")[:top]):
      show(axis, images[j], f"{scores[j, t]:.2f}", RIGHT if right[j, t] else None)
    show(line[-2], images[i])
    for place, j in enumerate(np.argsort(-scores[i], kind="stable")[:top]):
      line[-1].text(0, 0.9 - 0.2 * place, f"{scores[i, j]:.2f}  {fold(strings[j], 68, 1)}",
                    va="center", fontsize=7.5, parse_math=False, transform=line[-1].transAxes,
                    **(dict(color=RIGHT, weight="bold") if right[i, j] else {}))
  axes[0, 0].set_title(f"a text and the {top}\nmost similar images:", fontsize=8, loc="right")
  axes[0, -1].set_title(f"an image and the {top} most similar texts:", fontsize=8, loc="left")
  figure.supxlabel(f"{where}retrieval among the first {len(images)} images and their "
                   f"{len(strings)} texts, with cosine similarities. Green: right.", fontsize=8)
  return figure


def matrix(scores, right, images, strings, rows, columns, where):
  """Similarity of each of some images (across) with each of their texts (down)."""
  n = len(rows)
  figure = Figure((3 + 0.85 * n, 1.4 + 0.85 * n), layout="constrained")
  grid = figure.add_gridspec(2, n, height_ratios=[1, n])
  for place, i in enumerate(rows):
    show(figure.add_subplot(grid[0, place]), images[i])
  axis = figure.add_subplot(grid[1, :])
  values = scores[np.ix_(rows, columns)].T  # t i
  axis.imshow(values, cmap="viridis", aspect="auto")
  middle = (values.min() + values.max()) / 2
  for (t, i), value in np.ndenumerate(values):
    axis.text(i, t, f"{value:.2f}", ha="center", va="center", fontsize=8,
              color="black" if value > middle else "white",
              weight="bold" if right[rows[i], columns[t]] else "normal")
  axis.set_xticks([])
  axis.set_yticks(range(n), [fold(strings[t], 30) for t in columns], fontsize=8, parse_math=False)
  figure.supxlabel(f"{where}cosine similarity.\nBold: image and text belong together.", fontsize=8)
  return figure
