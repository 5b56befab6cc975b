"""DiT and SiT as the original repositories write them."""


import re
from collections.abc import Mapping

import numpy as np
from einops import pack

from interop import formats, layout, vit
from interop.formats import Format, Network
from interop.layout import rows
from models.dit import SIZES

DIT = [
  ("pos_embed", "position/table", "1 n d -> n d"),
  ("x_embedder.proj", "embed/projection", "patches"),
  ("t_embedder.mlp.0", "condition/time_in", "dense"),
  ("t_embedder.mlp.2", "condition/time_out", "dense"),
  ("y_embedder.embedding_table.weight", "condition/label/embedding", "v d -> v d"),
  ("final_layer.adaLN_modulation.1", "final/modulation", "dense"),
  ("final_layer.linear", "final/projection", "dense"),
]
BLOCK = [
  ("attn.qkv", "attention", "qkv"),
  ("attn.proj", "attention/out", "heads"),
  ("mlp.fc1", "mlp/up", "dense"),
  ("mlp.fc2", "mlp/down", "dense"),
  ("adaLN_modulation.1", "modulation", "dense"),
]


def dit_rows(model: Mapping):
  return [*rows(DIT, **vit.sizes(model)),
          *rows(BLOCK, "blocks.{i}.", "params/blocks", **vit.sizes(model))]


def fields(shapes, config, given) -> dict:
  embed = formats.patches(shapes, "x_embedder.proj.weight")
  up = "blocks.{i}.mlp.fc1.weight"
  mlp_dim, width = formats.shape(shapes, up.format(i=0), 2)
  depth = config.get("depth") or layout.depth(shapes, up)
  sizes = [size.heads for size in SIZES.values()
           if size[:2] == (width, depth) and mlp_dim == 4 * width]
  positions = formats.shape(shapes, "pos_embed", 3)[1]
  outputs = formats.shape(shapes, "final_layer.linear.weight", 2)[0]
  return dict(
    name="dit", **embed, depth=depth, mlp_dim=mlp_dim, positions="learned",
    heads=formats.need(given, "heads", config.get("num_heads"), *sizes),
    num_classes=formats.shape(shapes, "y_embedder.embedding_table.weight", 2)[0] - 1,
    learn_sigma=outputs == 2 * embed["channels"] * embed["patch"]**2,
    image_size=formats.image_size(positions, (0,), embed["patch"], given,
                                  config.get("input_size")))


def dit_describe(shapes, config, given) -> Network:
  model, method = fields(shapes, config, given), dict(path="vp_discrete", prediction="eps")
  if not model["learn_sigma"]:  # the recipe's sampler needs it
    method["samples"] = dict(sample=dict(sampler="ddpm", grid="discrete", steps=250,
                                         grid_options=dict(spacing="respaced")))
  return Network("configs/diffusion.py:imagenet_dit_xl2", model, dict(
    method=method, optimizer=dict(frozen="position")))


# --- SiT: DiT's names, data at time 1, and a second half of the outputs that nothing reads --------

def turned(kernel, width: int = 256):
  """A first layer's kernel [d, width] on [cos | sin] of time t, for times 1 - t; its own inverse.

  cos(w - wt) = cos w cos wt + sin w sin wt, and sin(w - wt) = sin w cos wt - cos w sin wt.
  """
  w = 10_000.0 ** -(np.arange(width // 2) / (width // 2))
  cos, sin = kernel[:, :width // 2], kernel[:, width // 2:]
  return pack([cos * np.cos(w)[None] + sin * np.sin(w)[None],
               cos * np.sin(w)[None] - sin * np.cos(w)[None]], "d *")[0]


def sit_gather(tensors: dict, model: Mapping) -> dict:
  """Velocity here points to the noise, there to the data."""
  tensors = dict(tensors)
  for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
    if name in tensors:
      x = tensors[name].reshape(model["patch"]**2, -1, model["channels"],
                                *tensors[name].shape[1:])                    # pq 2 c ...
      tensors[name] = -x[:, 0].reshape(-1, *tensors[name].shape[1:])
  return {**tensors, TIME: turned(tensors[TIME])} if TIME in tensors else tensors


def sit_scatter(tensors: dict, model: Mapping) -> dict:
  tensors = {**tensors, TIME: turned(tensors[TIME]).astype(tensors[TIME].dtype)}
  for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
    x = -tensors[name].reshape(model["patch"]**2, 1, model["channels"], *tensors[name].shape[1:])
    x, _ = pack([x, 0 * x], "pq * c d" if x.ndim == 4 else "pq * c")
    tensors[name] = x.reshape(-1, *tensors[name].shape[1:])
  return tensors


def sit_describe(shapes, config, given) -> Network:
  """2401.08740: the linear path, velocity; times are in [0, 1] as they are."""
  model = {**fields(shapes, config, given), "learn_sigma": False}
  method = dict(path="linear", prediction="velocity", time_scale=1.0)
  return Network("configs/diffusion.py:imagenet_sit_xl2", model, dict(
    method=method, optimizer=dict(frozen="position")))


TIME = "t_embedder.mlp.0.weight"
SIGNATURE = (r"^x_embedder\.proj\.weight", r"^final_layer\.")
FORMATS = [
  Format("dit/original", "original", SIGNATURE, dit_describe, dit_rows,
         limits=dict(mlp=("gelu",), qk_norm=(False,), rope=(False,))),
  Format("dit/sit", "sit", SIGNATURE, sit_describe, dit_rows, gather=sit_gather,
         scatter=sit_scatter, keep=re.escape(TIME) + r"|final_layer\.linear\..*",
         limits=dict(mlp=("gelu",), qk_norm=(False,), rope=(False,), learn_sigma=(False,))),
]
