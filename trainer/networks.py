"""The network of a config, and which parts of it another run has or gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from trainer import fields

# What the data says of a model's inputs and outputs, to models that ask for it.
FROM_TEXT = ("vocab_size", "context", "eos_id", "pad_id", "mask_id", "starts")
FROM_DATA = ("image_size", "channels", "num_classes", *FROM_TEXT)
FRESH = "^(head|pool_norm|map_pool|head_norm|representation)/"


class Init(NamedTuple):
  """What a run starts from; the fields are `config.init`."""

  run: str = ""  # run directory of a trained run
  source: str | None = None  # path of the part there, such as "encoder"; None: the image network,
  #                            whose positions, patches and channels are made to fit; "": everything
  into: str | None = None  # path of the part here, such as "image"; None and "": the same
  fresh: str | None = FRESH  # regular expression: what matches it below `into` starts anew
  text_run: str = ""  # run directory that the text network is taken from, as it is


def split_name(section: Mapping, field: str) -> tuple[str, dict]:
  section = dict(section)
  if not section.get("name"):
    raise ValueError(f"config.{field}.name is missing")
  return section.pop("name"), section


def make_model(config: ConfigDict):
  """The network of a config that `fill_from_data` has completed."""
  name, section = split_name(config.model, "model")
  make = fields.find_module("models", name, "config.model.name").make
  allowed = fields.accepted(make)
  from_data = {key: section.pop(key) for key in FROM_DATA if key in section and (
    key in allowed or key not in FROM_TEXT)}  # what is said of texts to others is refused below
  fields.check(config.dtype, allowed["dtype"].hint, "config.dtype")
  return fields.call(make, section, "model", dtype=config.dtype, **from_data)


def image_network(config: ConfigDict) -> tuple[str, Any]:
  """(its path in the parameters, the network itself) of a completed config's model."""
  module = fields.find_module("models", config.model.name, "config.model.name")
  path, model = getattr(module, "IMAGE_NETWORK", ""), make_model(config)
  return path, getattr(model, path) if path else model


def text_network(config: ConfigDict) -> str:
  """Its path in the parameters of a config's model. Raises ValueError where there is none."""
  module = fields.find_module("models", config.model.name, "config.model.name")
  if not hasattr(module, "TEXT_NETWORK"):
    raise ValueError(f"config.init.text_run: a model {config.model.name} has no text network that "
                     "runs share")
  return module.TEXT_NETWORK


def fill(config: ConfigDict) -> ConfigDict:
  """A config without `model.name` gets the image network of `init.run`, and its normalisation.

  Any gets the text network of `init.text_run`, and its tokenizer unless it has a file of its own.
  What the config says of the model goes before what the other run was.

  Raises ValueError or FileNotFoundError where there is no such run.
  """
  if not config.init:
    return config
  from models import adapt
  from trainer import store, stored
  init = fields.call(Init, config.init, "init")
  config = ConfigDict(config.to_dict())
  if init.text_run and "vocab_size" not in config.model:  # it has, in a finished run
    here, run = text_network(config), init.text_run
    there = stored.load_config(run)
    texts = adapt.text_fields(getattr(make_model(there), text_network(there)))
    config.model = {**{f"{here}_{name}": value for name, value in texts.items()},
                    **config.model.to_dict()}
    if not str(config.data.get("tokenizer")).endswith(".json"):
      config.data.tokenizer = str(Path(run) / store.TOKENIZER)
  if config.model.get("name"):  # a finished run needs no other one
    return config
  there = stored.load_config(given(init.run))
  config.model = {**adapt.fields(image_network(there)[1]), **config.model.to_dict()}
  for name in ("mean", "std"):
    if name in there.augment and config.augment.get(name) is None:
      config.augment[name] = there.augment[name]
  return config


def given(run: str | None) -> str:
  if not run:
    raise ValueError("config.init.run is not given: --config.init=DIR, the run directory to start "
                     "from")
  return run
