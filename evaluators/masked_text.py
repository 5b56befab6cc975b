"""How well the hidden tokens of texts are told, beside the share of each token in training."""

import textwrap
import warnings

import numpy as np
from matplotlib.figure import Figure

from evaluators import checks

BASELINES = ("unigram",)
RIGHT, WRONG = "tab:green", "tab:red"


def score(right, likelihood) -> dict[str, float]:
  """accuracy, in [0, 1], and perplexity, at least 1, of hidden tokens.

  Args:
    right: bool [n], whether each was told.
    likelihood: float [n], the natural logarithm of what it was given.
  """
  return {"accuracy": float(np.mean(right)),
          "perplexity": float(np.exp(-np.mean(likelihood, dtype=np.float64)))}


def unigram(train, hidden) -> dict[str, float]:
  """`score` of telling the commonest token of `train` [m], or each by (count + 1) / (m + v).

  v: the different tokens of both.
  """
  kinds, at = np.unique(np.concatenate([train, hidden]), return_inverse=True)
  count = np.bincount(at[:len(train)], minlength=len(kinds))
  share = (count + 1) / (len(train) + len(kinds))
  of_hidden = at[len(train):]
  return score(of_hidden == count.argmax(), np.log(share[of_hidden]))


def check(facts, split, limit, baselines, examples):
  """Raises ValueError on what `evaluate` would stumble over."""
  checks.at_least(facts.name, limit=(limit, 1), examples=(examples, 0))
  checks.all_known(facts.name, "baselines", baselines, BASELINES)
  checks.has_texts(facts.name, facts)
  checks.has_split(facts, split)
  checks.has_prediction(facts, "masked", *["own_tokens"] * bool(baselines))


def evaluate(context, split: str | None = None, limit: int | None = None,
             baselines: tuple[str, ...] = (), examples: int = 12):
  """`score` of the prediction `masked`, over all chosen tokens of a split.

  What is hidden follows from the split and the evaluation's batch size alone. Of images with
  several captions the first counts.

  Args:
    split: which; None = the evaluation split.
    limit: how many texts, spread over the split; None = all.
    baselines: of "unigram": what the counts of tokens in the training split tell.
    examples: texts that the figure shows, the first of those; 0 = no figure.

  Writes:
    `context.figures / masked_text_step{step:08d}.png`: texts and what was told of them.

  Raises:
    ValueError: a number out of range, an unknown baseline, data without texts.
  """
  checks.at_least("masked_text", limit=(limit, 1), examples=(examples, 0))
  checks.all_known("masked_text", "baselines", baselines, BASELINES)
  checks.has_texts("masked_text", context)
  split = split or context.eval_split
  out, batch = context.collect("masked", split, "text", limit=limit)
  chosen, ids = out["chosen"], np.take_along_axis(batch["text"], out["places"], 1)  # n m
  if not chosen.any():
    raise ValueError(f"evals.masked_text: the texts of {split!r} have no tokens of their own")
  metrics = score((out["told"] == ids)[chosen], out["likelihood"][chosen])
  if baselines:
    own, train = context.collect("own_tokens", context.train_split, "text", params=None)
    found = unigram(train["text"][own], ids[chosen])
    metrics |= {f"unigram/{name}": value for name, value in found.items()}
  if examples:
    rows = [spelt(context.detokenize, *row) for row in zip(
      batch["text"][:examples], out["places"], chosen, out["told"])]
    figure = draw(rows, f"Step {context.step}, {split}: accuracy {metrics['accuracy']:.1%} of "
                        f"{chosen.sum():,} hidden tokens (bold). Below each what was told, green "
                        "if right, else red.")
    context.figures.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # a character that the font has not shows as a box
      warnings.filterwarnings("ignore", "Glyph")
      figure.savefig(context.figures / f"masked_text_step{context.step:08d}.png", dpi=150)
  return metrics


def spelt(detokenize, ids, places, chosen, told) -> list[tuple[str, str]]:
  """(token, what was told of it or "") of each token of a text [l]; spaces of hidden ones show."""
  def say(token):
    return detokenize([token])

  guess = {place: token for place, token, is_chosen in zip(places, told, chosen) if is_chosen}
  return [(say(token), "") if i not in guess else
          tuple(say(x).replace(" ", "\u2423") or "?" for x in (token, guess[i]))
          for i, token in enumerate(ids)]


def draw(rows, caption: str, letters: int = 135):
  """One figure of texts, a row each, at most `letters` wide, over what was told of them."""
  figure = Figure((10, 0.45 * len(rows) + 0.6), layout="constrained")
  axis = figure.subplots()
  axis.set(xlim=(0, letters), ylim=(len(rows) - 0.3, -0.6))
  axis.axis("off")
  style = dict(family="monospace", fontsize=8.5, parse_math=False, va="center")
  for y, row in enumerate(rows):
    x = 0
    for token, told in row:
      axis.text(x, y - 0.2, token, weight="bold" if told else "normal",
                color="black" if told else "tab:gray", clip_on=True, **style)
      axis.text(x, y + 0.2, told, color=RIGHT if told == token else WRONG, clip_on=True, **style)
      x += max(len(token), len(told) + bool(told))
  figure.supxlabel(textwrap.fill(caption, 130), fontsize=8)
  return figure
