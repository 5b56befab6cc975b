"""What a published format is, and how its architecture is told from shapes and config.json."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from interop import layout
from models import vit

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=0.5, std=0.5)
ACTIVATIONS = {  # Hugging Face's and timm's names -> ours
  "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu", "relu": "relu",
  "silu": "silu"}
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu",
                  "relu": "relu", "silu": "silu"}


# Fields of config.model that leave no trace in shapes, and what files call them that tell.
SILENT = {
  "heads": ("num_attention_heads", "num_heads", "heads", "head_width"),
  "decoder_heads": ("decoder_num_attention_heads", "decoder_num_heads"),
  "text_heads": ("num_attention_heads", "heads"),
  "activation": ("hidden_act", "act_layer", "quick_gelu"),
  "norm_eps": ("layer_norm_eps", "norm_layer"),
}


class Network(NamedTuple):
  """What a file holds, as sections of a config."""

  recipe: str  # the config that says the rest, as --config takes it
  model: dict
  sections: dict[str, dict] = {}  # others: method, augment, ...


class Format(NamedTuple):
  """A family of networks as one publisher writes them; functions see canonical names."""

  name: str  # FAMILY/WHAT
  publisher: str  # what --to_format calls it
  signature: tuple[str, ...]  # regular expressions, each matches a name in every such file
  describe: Callable[[Mapping, Mapping, Mapping], Network]  # (name -> shape, config.json, given)
  rows: Callable[[Mapping], list[layout.Row]]  # of config.model
  prefixes: tuple[tuple[str, str], ...] = ()  # (what some names begin with, canonical)
  suffixes: tuple[tuple[str, str], ...] = ()  # (what some names end with, canonical)
  aside: str = ""  # regular expression: names that we have no use for
  new: str = ""  # regular expression: parts of ours that a file may leave out
  gather: Callable[[dict, Mapping], dict] = lambda tensors, model: tensors  # to what rows say
  scatter: Callable[[dict, Mapping], dict] = lambda tensors, model: tensors  # and back
  keep: str = ""  # regular expression: names that `gather` changes by rounding; kept as they were
  config: Callable[[Mapping, Any], dict] | None = None  # (config.model, config) -> config.json
  limits: Mapping[str, tuple] = {}  # field of config.model -> what can be written
  suffix: str = ".safetensors"
  told: tuple[str, ...] = ()  # of SILENT, the fields that its shapes tell
  images: bool = True  # whether the network is one of images, which need preprocessing
  backbone: bool = False  # whether the format has no place for what else a method trains

  @property
  def family(self) -> str:
    return self.name.partition("/")[0]

  def canonical(self, names) -> dict[str, str]:
    """{canonical name: name in the file}."""
    def rename(name):
      for begins, other in (("module.", ""), *self.prefixes):
        if name.startswith(begins):
          name = other + name.removeprefix(begins)
      for ends, other in self.suffixes:
        if name.endswith(ends):
          name = name.removesuffix(ends) + other
      return name
    return {rename(name): name for name in names}


def need(given: Mapping, field: str, *known):
  """The first value that is not None: what the user gave, or is known. Raises ValueError."""
  for value in (given.get(field), *known):
    if value is not None:
      return value
  raise ValueError(f"the file does not tell the model's {field}: give --config.model.{field}=VALUE")


def shape(shapes: Mapping, name: str, dims: int) -> tuple[int, ...]:
  """The shape of a tensor that has to be there. Raises ValueError."""
  if name not in shapes or len(shapes[name]) != dims:
    raise ValueError(f"{name}: expected a tensor of {dims} dimensions, found "
                     f"{list(shapes[name]) if name in shapes else 'none'}")
  return tuple(shapes[name])


def patches(shapes: Mapping, name: str) -> dict[str, int]:
  """patch, channels and width of a strided convolution [d, c, p, p]."""
  width, channels, patch, other = shape(shapes, name, 4)
  if patch != other:
    raise ValueError(f"{name}: patches of {patch}x{other} pixels; only square ones are supported")
  return dict(patch=patch, channels=channels, width=width)


def tower(shapes: Mapping, up: str, given: Mapping, heads=None, depth=None,
          prefix: str = "") -> dict[str, int]:
  """width, depth, mlp_dim and heads by the first layer "...{i}..." [mlp_dim, width] of its MLPs.

  Heads leave no trace: unless told they are those of the published size that all the rest fits.
  Where depth is told, a file may not hold fewer layers.
  """
  mlp_dim, width = shape(shapes, up.replace("{i}", "0"), 2)
  depth = given.get(f"{prefix}depth") or depth or layout.depth(shapes, up)
  fits = [size.heads for size in vit.SIZES.values() if size[:3] == (width, depth, mlp_dim)]
  return dict(width=width, depth=depth, mlp_dim=mlp_dim,
              heads=need(given, f"{prefix}heads", heads, *fits))


def image_size(rows: int, before: tuple[int, ...], patch: int, given: Mapping,
               known=None) -> tuple[int, int]:
  """Pixels (h, w) by the rows of a table of positions, some of them `before` those of the patches.

  The image is a square unless told otherwise. Raises ValueError where nothing fits.
  """
  told = given.get("image_size") or known
  for count in (rows - tokens for tokens in before):
    size = told or max(math.isqrt(max(count, 0)), 1) * patch
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if math.prod(side // patch for side in size) == count:
      return size
  raise ValueError(f"{rows} positions are not those of an image of "
                   f"{told or 'as many rows as columns'} in patches of {patch} pixels: give "
                   "--config.model.image_size=(HEIGHT,WIDTH)")


def activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise ValueError(f"config.json: activation {name!r}; known are {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def assumed(form: Format, model: Mapping, config: Mapping, given: Mapping) -> list[layout.Entry]:
  """What was taken for granted of a network, as neither shapes nor a file nor the user told it."""
  def keys(section):
    return set(section).union(*(keys(x) for x in section.values() if isinstance(x, Mapping)))

  there = keys(config)
  return [layout.Entry("assumed", "", None, f"config.model.{field} = {model[field]!r}",
                       note="no shape and no file tells it")
          for field, names in SILENT.items()
          if field in model and field not in given and field not in form.told
          and not there & {*names}]


def matches(patterns, names) -> bool:
  """Whether each regular expression is found in a name."""
  return all(any(re.search(pattern, name) for name in names) for pattern in patterns)
