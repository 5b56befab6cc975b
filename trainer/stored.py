"""What a run directory says of the run that is in it: its config, and its data."""

from etils import epath
from ml_collections import ConfigDict

from configs.base import get_base
from input_pipeline.records import Feature
from trainer.config import read_json, scheme
from trainer.store import DATA


def _data_said(workdir) -> dict:
  """What a run directory says of its data; {} where older code kept nothing."""
  path = epath.Path(workdir) / DATA
  return read_json(path) if path.exists() else {}


def load_fingerprint(workdir) -> str | None:
  """That of the data a run directory was made with; None where older code kept none."""
  return _data_said(workdir).get("fingerprint")


def load_facts(workdir) -> tuple[dict, tuple[str, ...]]:
  """(features, class names) of a run's data; empty where older code kept none."""
  said = _data_said(workdir)
  features = {name: Feature(tuple(shape), *rest)
              for name, (shape, *rest) in said.get("features", {}).items()}
  return features, tuple(said.get("class_names", ()))


def load_config(workdir) -> ConfigDict:
  """The config a run directory was made with; fields that are newer than it have their defaults.

  Raises FileNotFoundError if it holds no run.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{workdir} holds no run: there is no {path}")
  defaults = get_base().to_dict()
  config = {**defaults, **read_json(path)}
  if config["augment"].get("crop_area") and "eval_crop" not in config["augment"]:
    config["augment"]["eval_crop"] = 0.875  # what went with random crops, before it was a field
  if scheme(config["data"].get("source")) == "lines":  # texts had a black pixel once
    for section, name in ("augment", "image_size"), ("augment", "eval_crop"), (
        "model", "image_size"), ("model", "channels"):
      config[section].pop(name, None)
  return ConfigDict(config)
