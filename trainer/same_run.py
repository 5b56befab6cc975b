"""Whether the run in a directory is the one that is asked for: its config, data and tokenizer."""

import json
import logging
from pathlib import Path

import jax

from trainer import recipe, store

# Fields that do not change what is computed: a run may be continued with others.
FREE = ("mesh.", "checkpoint.", "evals.", "eval_", "log_every_", "wandb", "expect",
        "data.workers", "data.cache_bytes", "data.prefetch_batches", "data.tokenizer",
        "augment.eval_crop", "augment.eval_squash")
log = logging.getLogger("vitrine")


class TrainingError(RuntimeError):
  """Training stopped for a reason the user has to know; nothing already saved is lost."""


def check_same_run(workdir: Path, config: dict):
  """Writes config.json, or compares with the one there. Raises TrainingError if they differ."""
  path = workdir / "config.json"
  if path.exists():
    then = recipe.plain(store.load_config(workdir))
    lines = [line for line in recipe.differences(then, config)
             if not line.removeprefix("config.").startswith(FREE)]
    if lines:
      raise TrainingError(f"{workdir} holds a run with another config; choose another --workdir or "
                          "remove it. Its config differs in\n  " + "\n  ".join(lines))
  elif jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(config, indent=2) + "\n")


def write(path: Path, text: str):
  """Writes a file aside and puts it in its place: a kill leaves the whole of it or none."""
  partial = path.with_suffix(".tmp")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def keep_facts(workdir: Path, info):
  """Writes down what features and classes the data of a new run has."""
  path = workdir / store.DATA
  if not path.exists() and jax.process_index() == 0:
    write(path, store.data_facts(info))


def keep_tokenizer(path: Path, now: str):
  """Writes a run's tokenizer, or raises TrainingError if another is there."""
  if path.exists():
    if path.read_text(encoding="utf-8") != now:
      raise TrainingError(f"the tokenizer is not that of {path}; give it, "
                          f"--config.data.tokenizer={path}, to continue the run with it")
  elif jax.process_index() == 0:
    write(path, now)


def check_same_data(workdir: Path, saved: dict, now: dict):
  """Raises TrainingError if the run was trained on other data; warns if by other code."""
  if saved["data"] != now["data"]:
    raise TrainingError(f"the data is not what {workdir} was trained on: fingerprint {now['data']} "
                        f"now, {saved['data']} then. A continued run would not be the same run")
  if saved["code"] != now["code"]:
    log.warning("%s was saved by version %s of the code, this is %s: the continued run may differ "
                "from an unbroken one", workdir, saved["code"], now["code"])
