"""ViT as .npz: google-research/vision_transformer (old) and big_vision (new) write it."""

import functools
from collections.abc import Mapping

import numpy as np

from interop import formats, layout
from interop.formats import Format, Network
from interop.layout import rows
from interop.vit import (
  HEAD,
  IDENTITY,
  position,
  prefix_positions,
  sizes,
  supervised,
  without_class_position,
)

ATTENTION = "MultiHeadDotProductAttention"
NPZ = [
  ("cls", "cls", IDENTITY),
  ("embedding", "embed/projection", "flax patches"),
  ("Transformer/encoder_norm", "transformer/norm", "flax norm"),
  ("MAPHead_0/probe", "map_pool/probe", IDENTITY),
  (f"MAPHead_0/{ATTENTION}_0/{{query,key,value}}", "map_pool/attention", "flax q, k, v"),
  (f"MAPHead_0/{ATTENTION}_0/out", "map_pool/attention/out", "flax heads"),
  ("MAPHead_0/LayerNorm_0", "map_pool/norm", "flax norm"),
  ("MAPHead_0/MlpBlock_0/Dense_0", "map_pool/mlp/up", "flax dense"),
  ("MAPHead_0/MlpBlock_0/Dense_1", "map_pool/mlp/down", "flax dense"),
  ("head", "head", "flax dense"),
]


def npz_block(attention: int, norm: int, mlp: int):
  """Modules count from 0 by kind (new), or all together (old)."""
  return [
    ("LayerNorm_0", "attention_norm", "flax norm"),
    (f"{ATTENTION}_{attention}/{{query,key,value}}", "attention", "flax q, k, v"),
    (f"{ATTENTION}_{attention}/out", "attention/out", "flax heads"),
    (f"LayerNorm_{norm}", "mlp_norm", "flax norm"),
    (f"MlpBlock_{mlp}/Dense_0", "mlp/up", "flax dense"),
    (f"MlpBlock_{mlp}/Dense_1", "mlp/down", "flax dense"),
  ]


BLOCK, OLD_BLOCK = npz_block(0, 1, 0), npz_block(1, 2, 3)
POSITION, OLD_POSITION = "pos_embedding", "Transformer/posembed_input/pos_embedding"


def npz_rows(model: Mapping, table: str, block):
  return [*rows(NPZ + position(table, model), **sizes(model)),
          *rows(block, "Transformer/encoderblock_{i}/", "params/transformer/blocks",
                **sizes(model))]


def npz_describe(shapes, config, given, table: str, attention: int, mlp: int) -> Network:
  """Patch and heads are in the shapes. GELU is tanh's: that is flax's default."""
  block = "Transformer/encoderblock_{i}/"
  patch, other, channels, width = formats.shape(shapes, "embedding/kernel", 4)
  if patch != other:
    raise ValueError(f"embedding/kernel: patches of {patch}x{other} pixels; only square ones are "
                     "supported")
  _, heads, _ = formats.shape(shapes, f"{block.format(i=0)}{ATTENTION}_{attention}/query/kernel", 3)
  up = f"{block}MlpBlock_{mlp}/Dense_0/kernel"
  pool = "map" if "MAPHead_0/probe" in shapes else "cls" if "cls" in shapes else "mean"
  positions = formats.shape(shapes, table, 3)[1]
  model = dict(name="vit", patch=patch, channels=channels, width=width, heads=heads,
               depth=layout.depth(shapes, up),
               mlp_dim=formats.shape(shapes, up.format(i=0), 2)[1], pool=pool, norm_eps=1e-6,
               activation="gelu_tanh", image_size=formats.image_size(
                 positions, (1, 0) if "cls" in shapes else (0,), patch, given))
  network = supervised(model, shapes, "head/kernel", given, formats.HALF)
  if "head/kernel" in shapes:
    model["num_classes"] = shapes["head/kernel"][1]
  return network


def npz_scatter(tensors: dict, model: Mapping) -> dict:
  """New files have the class token's position in the token; old ones in the table."""
  x = tensors.get(POSITION)
  separate = "cls" in tensors and isinstance(x, np.ndarray) and not x[:, :1].any()
  return without_class_position(tensors, POSITION, "cls") if separate else tensors


FORMATS = [
  Format("vit/npz", "npz", (r"encoderblock_0/MlpBlock_0/",),
         functools.partial(npz_describe, table=POSITION, attention=0, mlp=0),
         functools.partial(npz_rows, table=POSITION, block=BLOCK),
         (("params/", ""), ("Transformer/pos_embedding", POSITION), (OLD_POSITION, POSITION)),
         new=HEAD, gather=lambda tensors, model: prefix_positions(
           tensors, model, POSITION, "cls", ""), scatter=npz_scatter, suffix=".npz",
         told=("heads",)),
  Format("vit/augreg", "npz", (r"encoderblock_0/MlpBlock_3/",),
         functools.partial(npz_describe, table=OLD_POSITION, attention=1, mlp=3),
         functools.partial(npz_rows, table=OLD_POSITION, block=OLD_BLOCK),
         (("opt/target/", ""), ("params/", ""), ("pos_embedding", OLD_POSITION)),
         new=HEAD, gather=lambda tensors, model: prefix_positions(
           tensors, model, OLD_POSITION, "cls", ""), suffix=".npz", told=("heads",)),
]
