"""Captions that a method writes, against those there are: exact match, words in common, BLEU."""

import itertools
import re
import warnings
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from sacrebleu import corpus_bleu

from evaluators import checks, distances, pictures, retrieval

BASELINES = ("pixels",)
WRONG = "tab:red"


def words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())


def f1(caption: str, reference: str) -> float:
  """Harmonic mean of precision and recall of a caption's words, repetitions counted (1606.05250).

  2 common / (words here + words there), in [0, 1]; case and punctuation do not count.
  """
  ours, theirs = Counter(words(caption)), Counter(words(reference))
  return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def score(captions: list[str], references: list[tuple[str, ...]]) -> dict[str, float]:
  """Scores one caption an image, each against all of that image's references.

  Returns:
    exact, the share that is one of them letter by letter; f1, the mean over images of the best
    `f1`, both in [0, 1]; bleu, of the corpus by sacrebleu with its defaults, in [0, 100].
  """
  streams = list(itertools.zip_longest(*references))
  pairs = list(zip(captions, references))
  return {"exact": float(np.mean([caption in own for caption, own in pairs])),
          "f1": float(np.mean([max(f1(caption, r) for r in own) for caption, own in pairs])),
          "bleu": corpus_bleu(captions, streams).score}


def spell(detokenize, ids) -> tuple[list[str], list[list[int]]]:
  """The words of a text of token ids [l], and the places of each one's tokens."""
  text, places = "", []
  for i in range(len(ids)):
    before, text = text, detokenize(ids[:i + 1])
    count = len(text.split())
    places += [[] for _ in range(count - len(places))]
    if text != before:  # the start and the end of a text spell nothing
      for word in range(min(len(before.split()), count - 1), count):
        places[word].append(i)
  return text.split(), places


def check(facts, split, limit, baselines, examples):
  """Raises ValueError on what `evaluate` would stumble over."""
  checks.at_least(facts.name, limit=(limit, 1), examples=(examples, 0))
  checks.all_known(facts.name, "baselines", baselines, BASELINES)
  checks.has_texts(facts.name, facts)
  checks.has_split(facts, split)
  checks.has_prediction(facts, "caption")


def evaluate(context, split: str | None = None, limit: int | None = None,
             baselines: tuple[str, ...] = (), examples: int = 8):
  """`score` of the prediction `caption` and, under its own prefix, of what needs no learning.

  Texts are compared as the tokenizer spells them: cut to the context, and lower-cased where it is
  set to.

  Args:
    split: which; None = the evaluation split.
    limit: how many examples, spread over the split; None = all.
    baselines: of "pixels": the first caption of the nearest training image, by Euclidean distance;
      all training images are held in memory.
    examples: images that the figure shows, the first of those; 0 = no figure.

  Writes:
    `context.figures / captions_step{step:08d}.png`: images with their captions and, if the method
    has the prediction `cross_attention`, what of the image each word attends to.

  Raises:
    ValueError: a number out of range, an unknown baseline, data without captions.
  """
  checks.at_least("captions", limit=(limit, 1), examples=(examples, 0))
  checks.all_known("captions", "baselines", baselines, BASELINES)
  checks.has_texts("captions", context)
  split = split or context.eval_split
  ids, batch = context.collect("caption", split, "captions", "num_captions", limit=limit)
  captions = [context.detokenize(row) for row in ids]
  references = [tuple(context.detokenize(row) for row in rows[:count])
                for rows, count in zip(batch["captions"], batch["num_captions"])]
  metrics = score(captions, references)
  if baselines:
    queries, _ = context.collect("pixels", split, params=None, limit=limit)
    bank, train = context.collect("pixels", context.train_split, "captions", params=None)
    place = np.asarray(distances.nearest(queries, bank, 1)[1])[:, 0]
    found = [context.detokenize(row) for row in train["captions"][place, 0]]
    metrics |= {f"pixels/{name}": value for name, value in score(found, references).items()}
  if examples:
    _, shown = context.collect("pixels", split, "image", params=None, limit=limit,
                               first=min(examples, len(ids)))
    figure = draw(context, shown["image"], ids, captions, references)
    figure.supxlabel(
      f"Step {context.step}, {split}: captions, green if right, else red and what they should be "
      "beside them. Maps: what of the image each word attends to in the last block, mean of its "
      "heads,\nfrom black over purple and orange to yellow: from 0 to the most of a patch.",
      fontsize=8)
    context.figures.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # a character that the font has not shows as a box
      warnings.filterwarnings("ignore", "Glyph")
      figure.savefig(context.figures / f"captions_step{context.step:08d}.png", dpi=150)
  return metrics


def draw(context, ready, ids, captions, references, most: int = 9):
  """One figure of images `ready` [b, h, w, c], a row each, and a map for each of `most` words."""
  images = pictures.rgb(context.to_pixels(ready))                            # b h w 3
  (b, h, w, _), attends = images.shape, "cross_attention" in context.predictions
  if attends:
    weights = context.predict("cross_attention", {"image": ready, "text": ids[:b]})
    weights = weights.mean(1)                                                # b l n
    weights = weights.reshape(*weights.shape[:2], *pictures.grid(weights.shape[-1], h, w))
  spelt = [spell(context.detokenize, row) for row in ids[:b]]
  columns = min(most, max(1, *(len(text) for text, _ in spelt))) if attends else 0
  figure = Figure((3.2 + 1.1 * (1 + columns), 1.3 * b + 0.5), layout="constrained")
  axes = figure.subplots(b, 2 + columns, squeeze=False, width_ratios=[2.9, *[1] * (1 + columns)])
  for axis in axes.flat:
    axis.axis("off")
  for line, i in zip(axes, range(b)):
    right = captions[i] in references[i]
    colour = retrieval.RIGHT if right else WRONG
    line[0].text(1, 0.95, retrieval.fold(captions[i], 34), ha="right", va="top", fontsize=8,
                 color=colour, weight="bold", parse_math=False, transform=line[0].transAxes)
    if not right:
      line[0].text(1, 0.05, retrieval.fold(references[i][0], 34), ha="right", va="bottom",
                   fontsize=8, color="tab:gray", parse_math=False, transform=line[0].transAxes)
    retrieval.show(line[1], images[i], color=colour)
    for axis, word, places in zip(line[2:], *spelt[i]):
      cells = pictures.heat(images[i:i + 1], weights[i, places].mean(0)[None, None])
      retrieval.show(axis, cells[0, 1])
      known = words(word) and set(words(word)) <= {a for own in references[i] for a in words(own)}
      axis.set_title(retrieval.fold(word, 14, 1), fontsize=8, pad=3, parse_math=False,
                     color="black" if known else WRONG)
  return figure
