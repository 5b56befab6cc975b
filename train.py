"""Trains a recipe.

  python train.py --config=configs/mae.py[:variant] [--workdir=DIR] [--config.any.field=value]

A workdir that holds a run is continued. Exit status: 0 if the run ended as asked, 75 if SIGTERM or
SIGINT stopped it and the same command will continue it, 1 otherwise.
"""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from trainer import environment
from trainer.environment import PREEMPTED


def parse_overrides(rest: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
  """["--config.a.b=1", "--config.c", "2"] -> {"a.b": "1", "c": "2"}."""
  overrides, rest = {}, list(rest)
  while rest:
    flag, equals, value = rest.pop(0).partition("=")
    if not flag.startswith("--config."):
      parser.error(f"unknown argument {flag}")
    if not equals and not rest:
      parser.error(f"{flag} needs a value")
    overrides[flag.removeprefix("--config.")] = value if equals else rest.pop(0)
  return overrides


def show_help(args, parser: argparse.ArgumentParser) -> int:
  if not args.help:
    parser.error("the following arguments are required: --config; --list names the recipes")
  print(parser.format_help())
  if args.config:
    from trainer import help
    try:
      print(help.help_of(args.config))
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
  return 0


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("-h", "--help", action="store_true",
                      help="with --config: every field of every section of that recipe")
  parser.add_argument("--list", action="store_true", help="the recipes and variants there are")
  parser.add_argument("--config", help="configs/NAME.py or configs/NAME.py:VARIANT")
  parser.add_argument("--print_config", action="store_true",
                      help="print the completed config and what would run, and stop")
  parser.add_argument("--workdir", help="run directory; default runs/NAME or runs/NAME_VARIANT")
  parser.add_argument("--data_dir", help="where data sets are prepared and looked for; default "
                      "$TFDS_DATA_DIR or ~/tensorflow_datasets")
  environment.add_flags(parser)
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, parser)
  if args.list:
    from trainer import listing
    print(listing.recipes())
    return 0
  if args.help or not args.config:
    return show_help(args, parser)

  environment.prepare(args)
  from trainer import loop, preemption, store
  command = shlex.join(["python", *(["train.py", *argv] if argv is not None else sys.argv)])
  with contextlib.closing(preemption.Signals(command)) as signals:
    try:
      return train(args, overrides, command, signals)
    except (ValueError, OSError, loop.TrainingError, store.CheckpointError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
    except preemption.Preempted as stop:
      print(f"{stop}\ncontinue with: {command}", file=sys.stderr)
      return PREEMPTED


def train(args, overrides: dict[str, str], command: str, signals) -> int:
  """What the flags ask for. Raises ValueError or OSError on a wrong config, and as `loop.train`."""
  from trainer import loop, preemption, recipe, same_run
  from trainer.config import hold_out
  config = recipe.load_config(args.config, overrides)
  workdir = Path(args.workdir or Path("runs") / config.config_name.replace(":", "_"))
  try:
    built = signals.at_once(
      lambda: recipe.build(hold_out(same_run.without_other_runs(config, workdir), workdir),
                           args.data_dir), preemption.before)
  except ValueError as error:
    raise ValueError(f"{error}{loop.may_skip(error, config)}") from error
  if args.print_config:
    from trainer import help
    help.print_config(built, workdir)
    return 0
  changed = recipe.differences(recipe.plain(recipe.load_config(args.config)), recipe.plain(config))
  loop.train(built, workdir, command, changed, signals)
  return 0


# What threads of the storage say by the score, after their error was told: of writing to a full
# disk, of reading a file that is cut short.
TOLD = ("Event loop is closed", "Encountered error while reading array index")


def hear_what_is_new(unraisable):
  """Passes over what is TOLD."""
  if not str(unraisable.exc_value).startswith(TOLD):
    sys.__unraisablehook__(unraisable)


def leave(status: int):
  """Ends the process; one that was stopped, or failed, does not wait for what threads still do.

  Those that were writing to a full disk would tell of it at length.
  """
  if status:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == "__main__":
  environment.keep_memory()
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="backslashreplace")  # a name must not end a run, in no locale
  sys.unraisablehook = hear_what_is_new
  leave(main())
