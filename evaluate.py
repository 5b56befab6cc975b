"""Evaluates a run directory: python evaluate.py --workdir=DIR [--step=N] [--config.evals.knn.k=10].

Runs the evaluators of its config, baselines included, prints their numbers and writes figures and
the run's report.html.

  python evaluate.py --workdir=DIR --zero_shot.classes="a, b, c" --images="PATH/*.png"

prints instead how likely each of your images is of each class, by a run on images and texts.

  python evaluate.py --compare DIR DIR... [--out=compare.html]

writes one page on several runs, side by side, from what they recorded.
"""

import argparse
import glob
import json
import logging
import sys
from pathlib import Path

from train import parse_overrides
from trainer import environment, report

log = logging.getLogger("vitrine")


def classify_images(run, pattern: str, classes: list[str],
                    templates: list[str]) -> tuple[list[dict], list[str]]:
  """([{"image": path, class: probability, ...}] of the files that `pattern` matches, errors)."""
  from evaluators import retrieval, zero_shot
  from input_pipeline.decode import decode
  from input_pipeline.records import BadRecord
  if run.tokenize is None:
    raise ValueError("--zero_shot.classes needs a run on images and texts, as of configs/clip.py")
  paths = sorted(glob.glob(pattern, recursive=True))
  if not paths:
    raise FileNotFoundError(f"--images={pattern}: no such file")
  names = zero_shot.parse_classes(classes[0] if len(classes) == 1 else classes)
  text = zero_shot.class_embeddings(
    lambda prompts: retrieval.embed_text(run.predict, run.tokenize(prompts)), names, templates)
  scale, rows, errors = run.predict("logit_scale", {}), [], []
  for path in paths:
    try:
      pixels = decode({"image": Path(path), "name": path}, run.config.model.channels)
    except BadRecord as error:
      errors.append(str(error))
      continue
    image = run.predict("embed_image", {"image": run.preprocess(pixels[None])})
    chances = zero_shot.classify(image, text, scale)[0]
    rows.append({"image": path, **dict(zip(names, map(float, chances)))})
  return rows, errors


def with_classes_of(run, data):
  """Data whose labels mean what they mean in the run, by the names of their classes.

  Left as it is where nothing that the run learnt hangs on labels. Raises ValueError where a class
  is none of the run's. A run of older code, or of data without names, knows but their number.
  """
  if not any(x.kind == "label" and name in run.method.needs
             for name, x in data.info.features.items()):
    return data
  if run.class_names:
    from input_pipeline.splits import with_classes
    return with_classes(data, run.class_names)
  here, there = data.info.num_classes, run.config.model.get("num_classes")
  if there is not None and here != there:
    log.warning("the run has %d classes, whose names it does not know; the data has %d, and they "
                "are taken for its first: accuracies are right only if these are the same", there,
                here)
  return data


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
  """(the flags, what --config.FIELD=VALUE says by field). Ends the command on a wrong one."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", help="a run directory made by train.py")
  parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
  parser.add_argument("--data_dir", help="where data sets are looked for")
  parser.add_argument("--images", help="a pattern of image files, with --zero_shot.classes")
  parser.add_argument("--zero_shot.classes", dest="classes", action="append",
                      help="names, with commas between; or the flag for each name, which may then "
                      "hold commas; or @FILE, with a name a line")
  parser.add_argument("--zero_shot.template", dest="templates", action="append",
                      help="a prompt with {} for the name; several are averaged; default '{}'")
  parser.add_argument("--compare", nargs="+", metavar="DIR", help="run directories")
  parser.add_argument("--out", default="compare.html", help="the page that --compare writes")
  parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
  environment.add_flags(parser)
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, parser)
  if bool(args.images) != bool(args.classes):
    parser.error("--images and --zero_shot.classes go together")
  if bool(args.workdir) == bool(args.compare):
    parser.error("give --workdir=DIR, or --compare DIR DIR...")
  return args, overrides


def main(argv: list[str] | None = None) -> int:
  args, overrides = parse(argv)
  if args.compare:
    try:
      print(f"report: {report.compare(args.compare, args.out)}")
    except (ValueError, OSError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
    return 0
  environment.prepare(args)
  import jax

  from trainer import checkpoints, evaluation, recipe, transfer
  from trainer.config import scheme
  from trainer.logging import print_evaluations
  try:
    run = checkpoints.load_run(args.workdir, args.step)
    if args.images:
      rows, errors = classify_images(run, args.images, args.classes, args.templates or ["{}"])
      print(json.dumps(rows)) if args.json else print_images(rows)
      for text in errors:
        print(f"error: {text}", file=sys.stderr)
      return int(bool(errors))
    config = recipe.ConfigDict(run.config.to_dict())
    config.own_data = False  # what is asked for here is meant
    if "model.patch" in overrides:
      config.model.image_size = None  # that of the images as they will be
    for key, value in overrides.items():
      recipe.override(config, key, value)
    if "data.source" in overrides and "data.held_out" not in overrides and scheme(
        config.data.source) == "folder":
      config.data.held_out = None  # a share of the run's own images, not of others
    data = with_classes_of(run, recipe.open_data(recipe.networks.fill(config), args.data_dir))
    built = recipe.build(config, args.data_dir, data=data)
    run = transfer.resized(run, built.config)
    metrics = evaluation.evaluate_run(run, built, args.workdir)
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  page = jax.process_index() == 0 and report.update(
    args.workdir, "evaluation", step=run.step, metrics=metrics,
    changed=[f"--config.{key}={value}" for key, value in overrides.items()])
  if args.json:
    print(json.dumps({"step": run.step, **metrics}))
  else:
    print(f"{args.workdir}, step {run.step}")
    print_evaluations(metrics)
    print("figures:", *sorted(map(str, (Path(args.workdir) / "figures").glob("*.png"))))
    print(f"report: {page or 'none'}")
  return 0


def print_images(rows: list[dict]):
  for row in rows:
    path = row.pop("image")
    best = sorted(row.items(), key=lambda item: -item[1])
    print(f"{path}: " + ", ".join(f"{name} {chance:.1%}" for name, chance in best[:5]))


if __name__ == "__main__":
  environment.keep_memory()
  sys.exit(main())
