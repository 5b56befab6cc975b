"""What a generator makes: grids of samples, and whether a judge recognises what was asked for."""

import textwrap
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from evaluators import checks, knn, pictures


def is_run(facts, field: str, workdir: str, rest: str = ""):
  """Raises ValueError where a local folder is no run directory."""
  if "://" not in workdir and not (Path(workdir).expanduser() / "config.json").is_file():
    raise ValueError(f"evals.{facts.name}.{field} = {workdir!r} holds no run: no config.json there"
                     + rest)


def check(facts, predictions, rows, per_class, count, judge, k, path, **_):
  """Raises ValueError on what `evaluate` would stumble over."""
  ranges(facts.name, rows, per_class, count, k, path)
  checks.has_prediction(facts, *predictions, field="predictions")
  if count and facts.info.num_classes and judge:
    is_run(facts, "judge", judge)
    checks.has_split(facts)


def ranges(evaluator: str, rows: int, per_class: int, count: int, k: int, path: int):
  checks.at_least(evaluator, per_class=(per_class, 0), count=(count, 0), path=(path, 0),
                  rows=(rows, 1), k=(k, 1))


def evaluate(context, predictions: tuple[str, ...] = ("sample",),
             guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0), rows: int = 10,
             per_class: int = 4, count: int = 1000, count_guidance: float = 2.0, judge: str = "",
             k: int = 5, path: int = 8):
  """Share of samples that a judge trained on real images recognises as the class asked for.

  Args:
    predictions: names of the method's samplers.
    guidance: scales that the figure shows, a block of columns each (one block without labels).
    rows: classes that the figure shows, evenly spread over all there are.
    per_class: samples of each class and scale in the figure; 0 = no figure.
    count: samples that the judge sees at the end of training, the classes in turn; 0 = none.
    count_guidance: their guidance scale.
    judge: run directory of a classifier of images of this size; "" = k-NN on the pixels of four
      fifths of the training split.
    k: its neighbours.
    path: times at which a figure shows samples on their way from noise, at the end of training and
      with `count_guidance`; 0 = no such figure.

  Writes:
    `context.figures / {prediction}_step{step:08d}.png`, a row for each class.
    `context.figures / {prediction}_path_step{step:08d}.png`.

  Returns:
    {prediction}/recognised for each prediction; judge/held_out, its accuracy on the real images of
    the evaluation split, or of the last fifth of the training split for k-NN. {} without labels.

  Raises:
    ValueError: numbers out of range.
  """
  ranges("samples", rows, per_class, count, k, path)
  classes, metrics = context.info.num_classes, {}
  shown = np.unique(np.linspace(0, max(classes - 1, 0), rows).round().astype(int))
  names = [str((context.info.class_names or range(classes))[i]) for i in shown] if classes else None
  scales = guidance if classes else (1.0,)
  judging = count and context.final and classes
  if judging:
    judged, metrics["judge/held_out"] = make_judge(context, judge, k, classes)
    labels = np.arange(count) % classes
  for prediction in predictions:
    if judging:
      images = draw(context, prediction, labels, count_guidance, seed=1)
      metrics[f"{prediction}/recognised"] = judged(images, labels)
    if per_class:
      labels_shown = np.repeat(shown, per_class) if classes else np.zeros(rows * per_class, int)
      blocks = [draw(context, prediction, labels_shown, scale, seed=0) for scale in scales]
      figure = sheet(np.stack(blocks), per_class, scales, names)
      figure.supxlabel(textwrap.fill(
        f"Step {context.step}, {prediction!r}" + (
          ": a row for each class, the same noise at every guidance scale (0: the class is not "
          "told)." if classes else "."), 90), fontsize=8)
      context.figures.mkdir(parents=True, exist_ok=True)
      figure.savefig(context.figures / f"{prediction}_step{context.step:08d}.png", dpi=150)
    if path and context.final and f"{prediction}_path" in context.predictions:
      figure = on_the_way(context, prediction, shown[:4] if classes else np.zeros(4), names,
                          count_guidance, path)
      context.figures.mkdir(parents=True, exist_ok=True)
      figure.savefig(context.figures / f"{prediction}_path_step{context.step:08d}.png", dpi=150)
  return metrics


def on_the_way(context, prediction: str, labels, names: list | None, scale: float, times: int):
  """Samples of `labels` [b] at some of the sampler's times: two rows each, x_t and x_0 from it."""
  out = context.predict(f"{prediction}_path", *request(
    context, image_shape(context), labels, scale, jax.random.key(context.seed)))
  calls = out["x0"].shape[1]
  chosen = np.unique(np.linspace(0, calls - 1, times).round().astype(int))
  x, x0 = (pictures.rgb(context.to_pixels(out[name])) for name in ("x", "x0"))
  x = x[:, [*chosen, -1]]                                                    # b times+1 h w 3
  x0 = np.concatenate([x0[:, chosen], np.ones_like(x0[:, :1])], axis=1)
  return pictures.mosaic(
    rearrange(np.stack([x, x0], 1), "b two t h w c -> (b two) t h w c"),
    [*(f"t = {t:.3g}" for t in out["t"][0, chosen]), "image"],
    [f"{names[i]}  {what}" if names else what for i in range(len(x))
     for what in ("x\u209c", "x\u2080")],
    f"Step {context.step}, {prediction!r}, " + (f"guidance {scale:g}, " if names else "")
    + f"{calls} calls of the network: x\u209c on its way from noise, and under it x\u2080, the "
    "image that the network takes to be behind it.", cell=0.9)


def image_shape(context) -> tuple[int, int, int]:
  """(h, w, c) of the images that the network sees."""
  _, batch = context.collect("pixels", context.train_split, "image", params=None, first=1)
  return batch["image"].shape[1:]


def request(context, shape, labels, scale: float, root):
  """What a sampler is asked: (batch of unit noise, `labels` [b] and guidance; its rng)."""
  noise_key, key = jax.random.split(root)
  inputs = {"noise": jax.random.normal(noise_key, (len(labels), *shape))}
  if context.info.num_classes:
    inputs |= {"label": np.asarray(labels, np.int32),
               "guidance": np.full(len(labels), scale, np.float32)}
  return inputs, key


def draw(context, prediction: str, labels, scale: float, seed: int):
  """Samples of `labels` [b] in [0, 1], [b, h, w, c], made in batches of one size.

  The noise follows from the run's seed and `seed`. Data without labels takes their number only.
  """
  size, shape, parts = min(250, len(labels)), image_shape(context), []
  for start in range(0, len(labels), size):
    root = jax.random.fold_in(jax.random.key(context.seed + seed), start)
    parts.append(context.predict(prediction, *request(
      context, shape, np.resize(labels[start:start + size], size), scale, root)))
  return np.clip(context.to_pixels(np.concatenate(parts)[:len(labels)]), 0, 1)


def make_judge(context, judge: str, k: int, classes: int):
  """((images in [0, 1] [b, h, w, c], labels [b]) -> accuracy, its accuracy on held-out images)."""
  split = context.eval_split if judge else context.train_split
  pixels, batch = context.collect("pixels", split, "image", "label", params=None)
  real = np.clip(context.to_pixels(pixels.reshape(batch["image"].shape)), 0, 1)
  labels = batch["label"]
  if judge:
    run = context.load_run(judge)

    def classify(images):
      stored = np.round(images * 255).astype(np.uint8)
      return run.predict("logits", {"image": run.preprocess(stored)}).argmax(1)
    return lambda x, y: float((classify(x) == y).mean()), float((classify(real) == labels).mean())
  held = np.arange(len(real)) % 5 == 4
  bank = real[~held].reshape((~held).sum(), -1)

  def judged(images, labels_asked):
    votes = knn.votes(bank, labels[~held], images.reshape(len(images), -1), 0.07, k=k,
                      classes=classes)
    return float((np.asarray(votes).argmax(1) == labels_asked).mean())
  return judged, judged(real[held], labels[held])


def sheet(images, per_class: int, guidance, names: list | None):
  """images [scales, rows * n, h, w, c] in [0, 1] -> one figure, blocks of n columns a scale."""
  scales, rows, (h, w) = len(images), images.shape[1] // per_class, images.shape[2:4]
  line = [(0, 0)] * 3 + [(0, 1), (0, 1), (0, 0)]                             # between images
  canvas = np.pad(rearrange(images, "s (r n) h w c -> s r n h w c", n=per_class), line,
                  constant_values=1)
  canvas = rearrange(canvas, "s r n h w c -> (r h) (s n w) c")[..., :3]      # of latents, the first
  width = per_class * (w + 1)
  figure = Figure((min(12, 0.45 * scales * per_class + 1), min(14, 0.45 * rows + 1)),
                  layout="constrained")
  axis = figure.subplots()
  axis.imshow(canvas if canvas.shape[-1] == 3 else canvas[..., 0], cmap="gray", vmin=0, vmax=1,
              interpolation="nearest")
  axis.set(xticks=[], yticks=[])
  axis.tick_params(length=0)
  if names:
    axis.set_xticks([(i + 0.5) * width for i in range(scales)],
                    [f"guidance {scale:g}" for scale in guidance], fontsize=8)
    axis.set_yticks([(i + 0.5) * (h + 1) for i in range(rows)], names, fontsize=8)
  for i in range(1, scales):
    axis.axvline(i * width - 1, color="tab:orange", linewidth=1.5)
  return figure
