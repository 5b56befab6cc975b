"""A run that is continued: whether it is the one that is asked for, by its config and its data."""

import inspect
import json
import logging
from pathlib import Path

import jax
import numpy as np

from trainer import fields, recipe, store, stored
from trainer.config import read_json, write
from trainer.store import TrainingError

# Fields that do not change what is computed: a run may be continued with others. Of data.on_error:
# what reads with "raise" comes to a bad record and stops, in memory before the first step and
# streamed before the batch that has it, so that no step was ever taken on what "skip" would have
# given in its place; and bad rows of a metadata file, which "skip" leaves out for good, let nothing
# start at all with "raise". A run that goes on with "skip" is the run that had it from the start.
FREE = ("mesh.", "checkpoint.", "evals.", "eval_", "log_every_", "wandb", "expect", "own_data",
        "optional_evals", "data.batch_at_most", "data.workers", "data.cache_bytes",
        "data.prefetch_batches", "data.tokenizer", "data.on_error", "augment.eval_crop",
        "augment.eval_squash")
log = logging.getLogger("vitrine")


def check(workdir: Path, config: dict, built=None):
  """Raises TrainingError where the run in `workdir` has another config; see `check_same_run`."""
  path = workdir / "config.json"
  written = read_json(path)
  then, free, done = recipe.plain(stored.load_config(workdir)), FREE, store.newest(workdir)
  if done:
    free = (*free, "data.source", "init")
  elif built and stored.load_fingerprint(workdir) == built.data.info.fingerprint:
    free = (*free, "data.source")
  lines = [line for line in recipe.differences(then, config)
           if not line.removeprefix("config.").startswith(free)]
  length = [line for line in lines if line.startswith("config.total_steps:")]
  if built and done and lines and lines == length:
    check_length(workdir, then, built, done)
    if jax.process_index() == 0:
      write(path, json.dumps(written | {"total_steps": built.total}, indent=2) + "\n")
  elif lines:
    raise TrainingError(f"{workdir} holds a run with another config; choose another --workdir or "
                        "remove it. Its config differs in\n  " + "\n  ".join(lines))


def check_length(workdir: Path, then: dict, built, done: int):
  """Raises TrainingError where the `done` steps of a run would be others with another length."""
  config, total = built.config, then["total_steps"]
  make = fields.find_module("methods", config.method.name, "config.method.name").make
  why = ""
  if built.total < done:
    why = f"it has taken {done:,} steps already"
  elif "total_steps" in inspect.signature(make).parameters:
    why = f"the method {config.method.name} looks at how long the run is"
  else:
    before = recipe.ConfigDict(config.to_dict() | {"total_steps": total})
    train_size = built.data.info.num_examples[built.data.train_split]
    rate = recipe.make_optimizer(before, train_size, built.method)[1]
    pairs = {"": (rate, built.rate), **{
      f" of group {name}": (own, built.rate.groups[name]) for name, own in rate.groups.items()}}
    steps = np.arange(done)
    for name, functions in pairs.items():
      old, new = (np.asarray(jax.vmap(f)(steps)) for f in functions)
      if changed := np.flatnonzero(old != new).tolist():
        at = changed[0]
        why = (f"at step {at + 1:,} its rate{name} was {old[at]:.4g} and would have been "
               f"{new[at]:.4g}")
  if why:
    raise TrainingError(
      f"{workdir} holds a run of total_steps = {total}; of total_steps = {built.total} it would "
      f"not be the same run: {why}. A new run can start from its parameters: another --workdir "
      f"with --config.init={workdir} --config.init.source= --config.init.fresh=none")


def completed(config, workdir: Path):
  """A config whose `init` names runs that are gone, with what the run in `workdir` has of them."""
  config, then = recipe.ConfigDict(config.to_dict()), stored.load_config(workdir)
  config.model = {**then.model.to_dict(), **config.model.to_dict()}
  for name in ("mean", "std"):
    if config.augment.get(name) is None and name in then.augment:
      config.augment[name] = then.augment[name]
  if config.init.get("text_run") and (workdir / store.TOKENIZER).exists():
    config.data.tokenizer = str(workdir / store.TOKENIZER)
  return config


def check_same_data(workdir: Path, saved: dict, now: dict):
  """Raises TrainingError if the run was trained on other data; warns if by other code."""
  if saved["data"] != now["data"]:
    places = [facts.get("config", {}).get("data", {}).get("source") for facts in (saved, now)]
    raise TrainingError(f"the data is not what {workdir} was trained on: fingerprint {now['data']} "
                        f"now, of {places[1]}, {saved['data']} then, of {places[0]}. A continued "
                        "run would not be the same run")
  if saved["code"] != now["code"]:
    log.warning("%s was saved by version %s of the code, this is %s: the continued run may differ "
                "from an unbroken one", workdir, saved["code"], now["code"])
