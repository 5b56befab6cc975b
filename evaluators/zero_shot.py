"""Zero-shot classification: an image's class is the one whose prompts are most similar to it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from evaluators import checks, retrieval


def parse_classes(classes):
  """Class names: "a, b", "@FILE" of a name a line, or a sequence of names -> tuple of str.

  A name must not be empty. Raises ValueError where one is, or the file cannot be read.
  """
  if isinstance(classes, str) and classes.startswith("@"):
    try:
      parts = Path(classes[1:]).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"evals.zero_shot.classes={classes!r}: {error}") from error
    parts = [part for part in parts if part.strip()]
  else:
    parts = classes.split(",") if isinstance(classes, str) else np.atleast_1d(classes)
  names = tuple(str(part).strip() for part in parts)
  if not names or "" in names:
    raise ValueError(f"evals.zero_shot.classes={classes!r} must be names, none of them empty")
  return names


def class_embeddings(embed, classes, templates=("{}",)):
  """One unit vector a class: the mean of its prompts' unit embeddings (2103.00020 sec. 3.1.4).

  Args:
    embed: list of str -> unit-norm embeddings [n, D].
    classes: C names.
    templates: prompts with "{}" for the name; a str is one template.

  Returns:
    float32 [C, D].

  Raises:
    ValueError: a template without "{}", or no template.
  """
  templates = (templates,) if isinstance(templates, str) else tuple(templates)
  wrong = [template for template in templates if "{}" not in str(template)]
  if wrong or not templates:
    raise ValueError(f"evals.zero_shot.templates={wrong or templates!r}: each needs a '{{}}', "
                     "where the class name goes")
  return checks.unit(sum(embed([template.replace("{}", name) for name in classes])
                         for template in templates))


def classify(images, classes, logit_scale):
  """Probability of each class: softmax(logit_scale * cosine similarity), float32 [B, C].

  Args:
    images: unit-norm embeddings [B, D].
    classes: of `class_embeddings`, [C, D].
    logit_scale: the multiplier itself, not its logarithm. A bias would change nothing.
  """
  return np.asarray(jax.nn.softmax(
      logit_scale * jnp.matmul(images, classes.T, precision="highest"), axis=-1))


def check(facts, classes, templates, split, examples):
  """Raises ValueError on what `evaluate` would stumble over."""
  checks.has_prediction(facts, "embed_image", "embed_text")
  names_for(facts, facts.name, classes)
  class_embeddings(lambda prompts: np.ones((1, 1)), (), templates)
  checks.at_least(facts.name, examples=(examples, 0))
  checks.has_texts(facts.name, facts)
  checks.has_split(facts, split)


def names_for(context, evaluator: str, classes):
  """The names of the classes, one a class of the data. Raises ValueError."""
  expected = checks.num_classes(context, evaluator)
  names = parse_classes(context.info.class_names if classes is None else classes)
  if len(names) != expected:
    raise ValueError(f"evals.{evaluator}.classes has {len(names)} names, but the data has "
                     f"{expected} classes")
  return names


def evaluate(context, classes: str | tuple[str, ...] | None = None,
             templates: str | tuple[str, ...] = ("{}",), split: str | None = None,
             examples: int = 8):
  """Top-1 and (of more than five classes) top-5 accuracy of `class_embeddings`, in [0, 1].

  Args:
    classes: names in the order of the labels, "a, b", "@FILE" with a name a line, or a tuple;
      None = the data's own.
    templates: see `class_embeddings`.
    split: which; None = the evaluation split.
    examples: images that the figure shows, the first of the split; 0 = no figure.

  Writes:
    `context.figures / zero_shot_step{step:08d}.png`: images with their three likeliest classes.

  Returns:
    top1, top5 (ties count as `retrieval.recall` says) and chance, what top1 is by guessing.

  Raises:
    ValueError: data without labels or captions, not one name a class, a bad template.
  """
  names = names_for(context, "zero_shot", classes)
  checks.at_least("zero_shot", examples=(examples, 0))
  checks.has_texts("zero_shot", context)
  split = split or context.eval_split
  embeddings = class_embeddings(
      lambda prompts: retrieval.embed_text(context.predict, context.tokenize(prompts)),
      names, templates)
  images, batch = context.collect("embed_image", split, "label")
  ks = (1, 5) if len(names) > 5 else (1,)
  hits = retrieval.recall(images, embeddings, (np.arange(len(images)), batch["label"]), ks)
  if examples:
    pixels, shown = context.collect("pixels", split, "image", "label", params=None, first=examples)
    pixels = context.to_pixels(pixels.reshape(shown["image"].shape))  # b h w c
    p = classify(images[:examples], embeddings, context.predict("logit_scale", {}))
    figure = sheet(pixels, shown["label"], p, names)
    figure.supxlabel(f"Step {context.step}, {split}: the likeliest classes, with probabilities. "
                     "Green: right.", fontsize=8)
    context.figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(context.figures / f"zero_shot_step{context.step:08d}.png", dpi=150)
  return {f"top{k}": hits[k] for k in ks} | {"chance": 1 / len(names)}


def sheet(images, labels, probabilities, names, top=3):
  """Images in [0, 1], each beside bars for its likeliest classes, two to a row."""
  rows = -(-len(images) // 2)
  figure = Figure((9, 1.1 * rows + 0.6), layout="constrained")
  axes = figure.subplots(rows, 4, squeeze=False, width_ratios=[1, 3, 1, 3]).reshape(-1, 2)
  for (left, right), image, label, p in zip(axes, images, labels, probabilities):
    retrieval.show(left, image)
    best = np.argsort(-p, kind="stable")[:top]
    for place, c in enumerate(best):
      right.barh(place, p[c], color=retrieval.RIGHT if c == label else "tab:gray", alpha=0.4)
      right.text(0.01, place, f"{p[c]:.2f}  {retrieval.fold(names[c], 36, 1)}", va="center",
                 fontsize=8, parse_math=False, weight="bold" if c == label else "normal")
    right.set(xlim=(0, 1), ylim=(top - 0.5, -0.5), xticks=[], yticks=[])
    right.set_title(retrieval.fold(f"is: {names[label]}", 44, 1), fontsize=8, loc="left",
                    parse_math=False)
    right.spines[:].set_visible(False)
  for axis in axes[len(images):].flat:
    axis.axis("off")
  return figure
