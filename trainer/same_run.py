"""What a run directory is begun with; where there is a run already it has to be the same one."""

import json
from pathlib import Path

import jax

from trainer import store
from trainer.config import write
from trainer.store import TrainingError


def check_same_run(workdir: Path, config: dict, built=None):
  """Writes config.json, or compares with the one there. Raises TrainingError if they differ.

  With checkpoints `init` is not compared, which no one reads any more, nor data.source, a place:
  `continued.check_same_data` compares the content. `built`, the Recipe, may say of another number
  of steps that the steps taken are the same with it; that number is written down, nothing else.
  """
  path = workdir / "config.json"
  if not path.exists():
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      write(path, json.dumps(config, indent=2) + "\n")
    return
  from trainer import continued  # loaded where there is a run
  continued.check(workdir, config, built)


def without_other_runs(config, workdir: Path):
  """A config whose `init` names runs that are gone, completed by what the run there has of them."""
  runs = [Path(run) for run in (config.init.get("run"), config.init.get("text_run")) if run]
  if all((run / "config.json").exists() for run in runs) or not store.newest(workdir):
    return config
  from trainer import continued
  return continued.completed(config, workdir)


def keep_facts(workdir: Path, info):
  """Writes down what features and classes the data of a run has, before it has a checkpoint."""
  path = workdir / store.DATA
  if jax.process_index() == 0 and not (path.exists() and store.newest(workdir)):
    write(path, store.data_facts(info))


def keep_tokenizer(path: Path, now: str):
  """Writes a run's tokenizer, or raises TrainingError if another is there."""
  if path.exists():
    if path.read_text(encoding="utf-8") != now:
      raise TrainingError(f"the tokenizer is not that of {path}; give it, "
                          f"--config.data.tokenizer={path}, to continue the run with it")
  elif jax.process_index() == 0:
    write(path, now)
