"""All published formats: which one a file is in, and the ways from and to it."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import numpy as np
from einops import EinopsError

from interop import bert, clip, dit, formats, layout, mae, moco, npz, resnet, vit
from interop.formats import Format
from models import positions
from models.vit import ViT

FAMILIES = (moco, mae, clip, bert, dit, resnet, vit, npz)
FORMATS: dict[str, Format] = {form.name: form for family in FAMILIES for form in family.FORMATS}
READABLE = [form for form in FORMATS.values() if form.describe]


def recognise(names: Iterable[str], config: Mapping, wanted: str = "") -> Format:
  """The format of a file by the names of its tensors and the config.json beside it.

  `wanted` is a format's name, its family or its publisher. Raises ValueError where none fits, or
  nothing tells two apart.
  """
  names = list(names)
  asked = [form for form in READABLE if wanted in ("", form.name, form.family, form.publisher)]
  if not asked:
    raise ValueError(f"--format={wanted}: expected one of {', '.join(f.name for f in READABLE)}, a "
                     "family (before the slash) or a publisher: "
                     + ", ".join(sorted({form.publisher for form in READABLE})))
  if len(asked) == 1:
    return asked[0]
  fits = [form for form in asked if formats.matches(form.signature, names)]
  if config.get("model_type") == "vit_mae" and VIT_HF in fits:
    return FORMATS["mae/hf"]
  if not fits and wanted == "mae":  # an encoder alone
    return next((FORMATS[f"mae/{form.publisher.replace('timm', 'original')}"] for form in READABLE
                 if form.family == "vit" and formats.matches(form.signature, names)),
                FORMATS["mae/original"])
  if not fits:
    raise ValueError("no known format has names such as " + ", ".join(sorted(names)[:5])
                     + (f" and is {wanted}" if wanted else "") + "; known are "
                     + ", ".join(form.name for form in asked))
  bare = not any(name.startswith(("head.", "fc_norm.", "attn_pool.")) for name in names)
  if fits[0].name == "vit/timm" and not wanted and not config and bare:
    raise ValueError("a ViT without a head, or the encoder of an MAE whose decoder is missing? "
                     "Give --format=timm or --format=mae")
  return fits[0]


def unwrapped(source):
  """(a `files.Source` without what wrappers put before its names, what to tell of it)."""
  prefix = wrapper(source.tensors)
  tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
  told = f"; {prefix!r} taken off all {len(tensors)} names" if prefix else ""
  return source._replace(tensors=tensors), told


VIT_HF = FORMATS["vit/hf"]
# Of what people train in: DDP, torch.compile, Lightning, teacher and student, averages.
WRAPPERS = ("module", "_orig_mod", "model", "student", "teacher", "network", "net")


def wrapper(names: Iterable[str]) -> str:
  """What wrappers put before all names alike, as "module._orig_mod."; "" where they put nothing."""
  names, prefix = list(names), ""
  while len(begins := {name.partition(".")[0] for name in names}) == 1 and begins < {*WRAPPERS}:
    (found,) = begins
    prefix, names = f"{prefix}{found}.", [name.removeprefix(f"{found}.") for name in names]
  return prefix


def fields(network: nn.Module, config: Mapping) -> dict:
  """All fields of a network and of those in it, as config.model says them; "text_" of a text."""
  def inside(module):
    own = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)
           if field.name not in ("parent", "name")}
    found = {}
    for name, value in own.items():
      prefix = {"decoder": "decoder_", "text": "text_"}.get(name, "")
      if isinstance(value, nn.Module):
        found |= {key if key in ("vocab_size", "context", "eos_id", "pad_id") else prefix + key: x
                  for key, x in inside(value).items()}
    return found | {name: x for name, x in own.items() if not isinstance(x, nn.Module)}
  return inside(network) | {"name": config["name"], "backbone": config.get("backbone", "resnet")}


def gathered(form: Format, model: Mapping, shapes: Mapping) -> dict:
  """{canonical name: shape and type} of what the rows of a format see of a file."""
  try:
    return jax.eval_shape(lambda tensors: form.gather(tensors, model), {
      name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})
  except (TypeError, EinopsError) as error:
    raise ValueError(f"the shapes do not fit together as those of {form.name}: "
                     f"{str(error).splitlines()[0]}") from error


def account(form: Format, model: Mapping, shapes: Mapping, expected: Mapping) -> list[layout.Entry]:
  """`layout.account` of a file, {canonical name: shape}, and of ours, {path: array}."""
  return layout.account(form.rows(model), gathered(form, model, shapes), expected,
                        aside=form.aside, new=form.new)


def take(form: Format, model: Mapping, tensors: Mapping, expected: Mapping) -> dict:
  """{our path: array of the expected type} from {canonical name: array}."""
  found = layout.ours(form.rows(model), form.gather(dict(tensors), model))
  return {path: np.ascontiguousarray(x, expected[path].dtype).reshape(expected[path].shape)
          for path, x in found.items() if path in expected}


# What every format has, of each network in it, unless its own limits say something else.
LIMITS = {prefix + field: allowed for prefix in ("", "text_") for field, allowed in {
  "placement": ("pre",), "window": (0,), "patch_stem": ("patches",),
  "positions": positions.ABSOLUTE}.items()}


def misfit(form: Format, model: Mapping) -> str:
  """Why a format cannot say what this network is, or ""."""
  for field, allowed in {**LIMITS, **form.limits}.items():
    default = getattr(ViT, field.removeprefix("text_"), False)
    value = model[field] if model.get(field) is not None else default
    if value not in allowed:
      return (f"config.model.{field} = {value!r}: {form.name} has "
              f"{' or '.join(map(repr, allowed))}")
  return ""


def give(form: Format, model: Mapping, arrays: Mapping) -> dict:
  """{canonical name: array} from {our path: array}; fixed positions are written as tables.

  Raises ValueError where the format has no place for something of ours.
  """
  if why := misfit(form, model):
    raise ValueError(why)
  table = form.rows(model)
  arrays = {**_fixed_positions(table, model, arrays), **arrays}
  named = {path for row in table for path in row.ours}
  alone = re.compile(form.new or "$")  # what a file need not have and no row speaks of
  rest = [path for path in arrays if path not in named and not alone.match(path)]
  if rest and not form.backbone:
    raise ValueError(f"{form.name} has no place for {', '.join(rest[:5])}")
  tensors = form.scatter(layout.theirs(table, arrays), model)
  return {name: x.astype(np.int64) if x.dtype == np.int32 else x  # PyTorch's integers
          for name, x in tensors.items()}


def _fixed_positions(table: Iterable[layout.Row], model: Mapping, arrays: Mapping) -> dict:
  fixed = {}
  for path in (path for row in table for path in row.ours if path.endswith("position/table")):
    where = path.removesuffix("position/table")
    kernel = arrays.get(f"{where}embed/projection/kernel", arrays.get(f"{where}embed/kernel"))
    if path in arrays or kernel is None or model.get("positions") not in positions.FIXED:
      continue
    grid = tuple(side // model["patch"] for side in model["image_size"])
    fixed[path] = positions.FIXED[model["positions"]](grid, kernel.shape[-1])
    for token in ("cls_position", "prefix_position"):
      fixed[where + token] = np.zeros((1, 1, kernel.shape[-1]), np.float32)
  named = {path for row in table for path in row.ours}
  return {path: x for path, x in fixed.items() if path in named}


def to_write(model: Mapping, publisher: str, came_as: str = "") -> Format:
  """The format that a network goes out in, best the one it came in. Raises ValueError."""
  mine = [form for form in FORMATS.values() if form.family == model["name"]]
  asked = [form for form in mine if publisher in (form.publisher, form.name)]
  if not asked:
    raise ValueError(f"--to_format={publisher}: {model['name']} goes out as "
                     + ", ".join(sorted({form.publisher for form in mine})))
  fits = [form for form in asked if not misfit(form, model)]
  if not fits:
    raise ValueError("; ".join(misfit(form, model) for form in asked))
  return next((form for form in fits if form.name == came_as), fits[0])
