"""Evaluates a run directory: python evaluate.py --workdir=DIR [--step=N] [--config.evals.knn.k=10].

Runs the evaluators of its config, baselines included, prints their numbers and writes figures.
"""

import argparse
import json
import sys
from pathlib import Path

from train import parse_overrides
from trainer import environment


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="a run directory made by train.py")
  parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
  parser.add_argument("--data_dir", help="where data sets are looked for")
  parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
  environment.add_flags(parser)
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, parser)

  environment.prepare(args)
  from trainer import checkpoints, evaluation, recipe
  from trainer.logging import print_evaluations
  try:
    run = checkpoints.load_run(args.workdir, args.step)
    for key, value in overrides.items():
      recipe.override(run.config, key, value)
    built = recipe.build(run.config, args.data_dir)
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  metrics = evaluation.evaluate_run(run, built, args.workdir)
  if args.json:
    print(json.dumps({"step": run.step, **metrics}))
  else:
    print(f"{args.workdir}, step {run.step}")
    print_evaluations(metrics)
    print("figures:", *sorted(map(str, (Path(args.workdir) / "figures").glob("*.png"))))
  return 0


if __name__ == "__main__":
  environment.use_huge_pages()
  sys.exit(main())
