"""ViT as Hugging Face (ViT, DeiT, DINOv2) and timm write it."""

import functools
import math
from collections.abc import Mapping

import numpy as np
from einops import pack

from interop import formats, preprocessing
from interop.formats import Format, Network
from interop.layout import rows

IDENTITY = "a b d -> a b d"
BICUBIC = {**formats.IMAGENET, "interpolation": "bicubic"}  # the original DeiT and DINOv2

# --- timm (the original MAE, MoCo v3 and DiT have its blocks too) ---------------------------------

TIMM_BLOCK = [
  ("norm1", "attention_norm", "norm"),
  ("attn.qkv", "attention", "qkv"),
  ("attn.q_norm", "attention/query_norm", "norm"),
  ("attn.k_norm", "attention/key_norm", "norm"),
  ("attn.proj", "attention/out", "heads"),
  ("ls1.gamma", "attention_scale", "d -> d"),
  ("norm2", "mlp_norm", "norm"),
  ("mlp.fc1", "mlp/up", "dense"),
  ("mlp.fc2", "mlp/down", "dense"),
  ("ls2.gamma", "mlp_scale", "d -> d"),
]
TIMM = [
  ("cls_token", "cls", IDENTITY),
  ("reg_token", "registers", IDENTITY),
  ("patch_embed.proj", "embed/projection", "patches"),
  ("norm_pre", "input_norm", "norm"),
  ("norm", "transformer/norm", "norm"),
  ("fc_norm", "pool_norm", "norm"),
  ("attn_pool.latent", "map_pool/probe", IDENTITY),
  ("attn_pool.qkv", "map_pool/attention", "qkv"),
  ("attn_pool.proj", "map_pool/attention/out", "heads"),
  ("attn_pool.norm", "map_pool/norm", "norm"),
  ("attn_pool.mlp.fc1", "map_pool/mlp/up", "dense"),
  ("attn_pool.mlp.fc2", "map_pool/mlp/down", "dense"),
  ("head", "head", "dense"),
]


def position(name: str, model: Mapping, pattern: str = "1 n d -> n d"):
  """The row of a table of positions, with the class token's first if there is one."""
  own = has_class_token(model) and model.get("class_position", True)
  ours = "cls_position + position/table" if own else "position/table"
  return [(name, ours, pattern)]


def has_class_token(model: Mapping) -> bool:
  token = model.get("class_token")
  return model.get("pool", "cls") == "cls" if token is None else token


def sizes(model: Mapping, prefix: str = "") -> dict[str, int]:
  """Of the axes in patterns."""
  found = {"k": model.get(f"{prefix}heads"), "p": model.get("patch"), "q": model.get("patch"),
           "c": model.get("channels")}
  return {axis: n for axis, n in found.items() if n}


def timm_rows(model: Mapping, ours: str = "params", theirs: str = ""):
  return [*rows(TIMM + position("pos_embed", model), theirs, ours, **sizes(model)),
          *rows(TIMM_BLOCK, theirs + "blocks.{i}.", f"{ours}/transformer/blocks", **sizes(model))]


def timm_gather(tensors: dict, model: Mapping) -> dict:
  """The pool's q and kv become one; positions as `prefix_positions` says."""
  tensors = dict(tensors)
  for leaf in ("weight", "bias"):
    names = [f"attn_pool.{part}.{leaf}" for part in ("q", "kv")]
    if all(name in tensors for name in names):
      tensors[f"attn_pool.qkv.{leaf}"], _ = pack([tensors.pop(name) for name in names],
                                                 "* d" if leaf == "weight" else "*")
  return prefix_positions(tensors, model, "pos_embed", "cls_token", "reg_token")


def prefix_positions(tensors: dict, model: Mapping, table: str, cls: str, registers: str) -> dict:
  """A table with one row before the patches', the class token's, if there is such a token.

  Without one in the file it is zeros. Registers have no positions: they are added to them.
  """
  if table not in tensors or cls not in tensors or not model.get("class_position", True):
    return tensors
  tensors, x = dict(tensors), tensors[table]                                 # 1 before+n d
  before = x.shape[1] - math.prod(side // model["patch"] for side in model["image_size"])
  if before > 1 and registers in tensors:
    tensors[registers] = tensors[registers] + x[:, 1:before]
  first = x[:, :1] if before else 0 * x[:, :1]
  tensors[table], _ = pack([first, x[:, before:]], "b * d")
  return tensors


def without_class_position(tensors: dict, table: str, cls: str) -> dict:
  """The class token's position is added to it."""
  x = tensors[table]
  return {**tensors, cls: tensors[cls] + x[:, :1], table: x[:, 1:]}


def timm_scatter(tensors: dict, model: Mapping) -> dict:
  tensors = dict(tensors)
  for leaf in ("weight", "bias"):
    x = tensors.pop(f"attn_pool.qkv.{leaf}", None)
    if x is not None:
      tensors[f"attn_pool.q.{leaf}"] = x[:len(x) // 3]
      tensors[f"attn_pool.kv.{leaf}"] = x[len(x) // 3:]
  if model.get("registers") and "cls_token" in tensors:  # with them timm knows no other way
    return without_class_position(tensors, "pos_embed", "cls_token")
  return tensors


def timm_config(config: Mapping) -> dict:
  """Its config.json, or the arguments of a constructor, as one dict."""
  return {**config, **(config.get("model_args") or {})}


def timm_model(shapes, config, given, name="vit") -> dict:
  """The fields that original MAE and MoCo v3 have too."""
  model = dict(name=name, **formats.patches(shapes, "patch_embed.proj.weight") | formats.tower(
    shapes, "blocks.{i}.mlp.fc1.weight", given, config.get("num_heads"), config.get("depth")))
  positions, before = formats.shape(shapes, "pos_embed", 3)[1], (0,)
  if "cls_token" in shapes:
    before = (1, 0, 1 + shapes.get("reg_token", (1, 1))[1])
  model.update(norm_eps=config.get("layer_norm_eps", 1e-6),
               activation=formats.activation(config.get("act_layer") or "gelu"),
               image_size=formats.image_size(positions, before, model["patch"], given,
                                             config.get("img_size")))
  return model


def timm_describe(shapes, config, given) -> Network:
  config = timm_config(config)
  model = timm_model(shapes, config, given)
  pool = config.get("global_pool")
  if "attn_pool.latent" in shapes:
    pool = "map"
  elif "fc_norm.weight" in shapes or "cls_token" not in shapes:
    pool = "mean"
  model["pool"] = {"token": "cls", "avg": "mean", "": "cls", None: "cls"}.get(pool, pool)
  model.update(class_token="cls_token" in shapes, pool_before_norm="fc_norm.weight" in shapes,
               pre_norm="norm_pre.weight" in shapes,
               patch_bias="patch_embed.proj.bias" in shapes,
               qk_norm="blocks.0.attn.q_norm.weight" in shapes,
               registers=shapes["reg_token"][1] if "reg_token" in shapes else 0,
               layer_scale=1e-5 if "blocks.0.ls1.gamma" in shapes else 0.0)
  return supervised(model, shapes, "head.weight", given, formats.HALF)


def supervised(model, shapes, head: str, given, augment) -> Network:
  """A classifier. Without a head in the file it gets a new one, of 1000 classes unless told."""
  rows_of_head = shapes[head][0] if head in shapes else None
  model["num_classes"] = formats.need(given, "num_classes", rows_of_head, 1000)
  return Network("configs/vit.py:imagenet_b16_augreg", model, dict(augment=augment))


def timm_out(model, config) -> dict:
  size = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
  known = {s[:3]: name for name, s in formats.vit.SIZES.items()}
  found = size.get(known.get((model["width"], model["depth"], model["mlp_dim"])), "custom")
  return {
    "architecture": f"vit_{found}_patch{model['patch']}_{model['image_size'][0]}",
    "num_classes": model["num_classes"],
    "global_pool": {"cls": "token", "mean": "avg"}.get(model["pool"], model["pool"]),
    "model_args": dict(
      img_size=list(model["image_size"]), patch_size=model["patch"], embed_dim=model["width"],
      depth=model["depth"], num_heads=model["heads"],
      mlp_ratio=model["mlp_dim"] / model["width"],
      no_embed_class=bool(model.get("registers")) or not model.get("class_position", True)),
    "pretrained_cfg": preprocessing.to_timm(config.augment, model["channels"])}


# --- Hugging Face ---------------------------------------------------------------------------------

HF_EMBED = [
  ("embeddings.cls_token", "cls", IDENTITY),
  ("embeddings.patch_embeddings.projection", "embed/projection", "patches"),
]
HF_ATTENTION = [
  ("attention.attention.{query,key,value}", "attention", "q, k, v"),
  ("attention.output.dense", "attention/out", "heads"),
]
HF_BLOCK = [
  ("layernorm_before", "attention_norm", "norm"),
  *HF_ATTENTION,
  ("layernorm_after", "mlp_norm", "norm"),
  ("intermediate.dense", "mlp/up", "dense"),
  ("output.dense", "mlp/down", "dense"),
]
DINO_BLOCK = [
  ("norm1", "attention_norm", "norm"),
  *HF_ATTENTION,
  ("layer_scale1.lambda1", "attention_scale", "d -> d"),
  ("norm2", "mlp_norm", "norm"),
  ("mlp.fc1", "mlp/up", "dense"),
  ("mlp.fc2", "mlp/down", "dense"),
  ("layer_scale2.lambda1", "mlp_scale", "d -> d"),
]
DISTILLATION = "vit.embeddings.distillation_token"
PREFIXES = (("deit.", "vit."), ("dinov2_with_registers.", "vit."), ("dinov2.", "vit."),
            ("embeddings.", "vit.embeddings."), ("encoder.", "vit.encoder."),
            ("layernorm.", "vit.layernorm."), ("pooler.", "vit.pooler."),
            ("cls_classifier.", "classifier."))


def hf_rows(model: Mapping, ours: str = "params", block=HF_BLOCK, registers="register_tokens"):
  embed = [*HF_EMBED, *position("embeddings.position_embeddings", model),
           (f"embeddings.{registers}", "registers", IDENTITY),
           ("layernorm", "transformer/norm", "norm")]
  return [*rows(embed, "vit.", ours, **sizes(model)),
          *rows(block, "vit.encoder.layer.{i}.", f"{ours}/transformer/blocks", **sizes(model)),
          *rows([("classifier", "head", "dense")], "", ours)]


def hf_model(shapes, config, given, up="vit.encoder.layer.{i}.intermediate.dense.weight",
             name="vit", norm_eps=1e-12) -> dict:
  model = dict(name=name, **formats.patches(
    shapes, "vit.embeddings.patch_embeddings.projection.weight") | formats.tower(
      shapes, up, given, config.get("num_attention_heads"), config.get("num_hidden_layers")))
  positions = formats.shape(shapes, "vit.embeddings.position_embeddings", 3)[1]
  before = (1 + (DISTILLATION in shapes),)
  model.update(norm_eps=config.get("layer_norm_eps", norm_eps),
               activation=formats.activation(config.get("hidden_act", "gelu")),
               image_size=formats.image_size(positions, before, model["patch"], given,
                                             config.get("image_size")))
  return model


def hf_describe(shapes, config, given) -> Network:
  model = hf_model(shapes, config, given)
  distilled = DISTILLATION in shapes
  if distilled:
    model["registers"] = 1
  return supervised(model, shapes, "classifier.weight", given,
                    BICUBIC if distilled else formats.HALF)


def dino_describe(shapes, config, given) -> Network:
  model = hf_model(shapes, config, given, "vit.encoder.layer.{i}.mlp.fc1.weight", norm_eps=1e-6)
  registers = shapes.get("vit.embeddings.register_tokens", (1, 0))[1]
  model.update(registers=registers, layer_scale=float(config.get("layerscale_value", 1.0)))
  return supervised(model, shapes, "classifier.weight", given, BICUBIC)


DEIT = "vit.embeddings.position_embeddings", "vit.embeddings.cls_token", DISTILLATION


def deit_scatter(tensors: dict, model: Mapping) -> dict:
  x = tensors[DEIT[0]]
  table, _ = pack([x[:, :1], 0 * x[:, :1], x[:, 1:]], "b * d")
  return {**tensors, DEIT[0]: table}


def dino_scatter(tensors: dict, model: Mapping) -> dict:
  """Blocks without layer scale are those with one of 1."""
  ones = np.ones(model["width"], np.float32)
  return {**{f"vit.encoder.layer.{i}.layer_scale{j}.lambda1": ones
             for i in range(model["depth"]) for j in (1, 2)}, **tensors}


def hf_out(model, config, **other) -> dict:
  """What all of Hugging Face's ViTs say of themselves."""
  h, w = model["image_size"]
  return dict(hidden_size=model["width"], num_hidden_layers=model["depth"],
              num_attention_heads=model["heads"], intermediate_size=model["mlp_dim"],
              hidden_act=formats.HF_ACTIVATIONS[model.get("activation", "gelu")],
              layer_norm_eps=model.get("norm_eps", 1e-6), image_size=h if h == w else [h, w],
              patch_size=model["patch"], num_channels=model["channels"], qkv_bias=True, **other)


def hf_vit_out(model, config) -> dict:
  names = {str(i): f"LABEL_{i}" for i in range(model["num_classes"])}
  return dict(architectures=["ViTForImageClassification"], model_type="vit",
              id2label=names, label2id={name: int(i) for i, name in names.items()},
              **hf_out(model, config))


def deit_out(model, config) -> dict:
  return {**hf_vit_out(model, config), "architectures": ["DeiTForImageClassification"],
          "model_type": "deit"}


def dino_out(model, config) -> dict:
  registers = model.get("registers", 0)
  return dict(
    architectures=["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
    model_type="dinov2_with_registers" if registers else "dinov2",
    mlp_ratio=model["mlp_dim"] / model["width"], layerscale_value=model["layer_scale"],
    **({"num_register_tokens": registers} if registers else {}), **hf_out(model, config))


HEAD = "params/head"
HF_LIMITS = dict(pool=("cls",), class_position=(True,), pre_norm=(False,),
                 norm=("layernorm",), qk_norm=(False,), pool_before_norm=(False,))
VIT_HF = Format(
  "vit/hf", "hf", (r"embeddings\.patch_embeddings", r"\.layernorm_before\."), hf_describe, hf_rows,
  PREFIXES, aside=r"vit\.pooler\..*|vit\.embeddings\.mask_token", new=HEAD, config=hf_vit_out,
  limits={**HF_LIMITS, "registers": (0,), "layer_scale": (0,)})
FORMATS = [
  Format("vit/deit", "hf", (r"embeddings\.distillation_token",), hf_describe,
         functools.partial(hf_rows, registers="distillation_token"), PREFIXES,
         aside=r"vit\.pooler\..*|distillation_classifier\..*|vit\.embeddings\.mask_token", new=HEAD,
         gather=lambda tensors, model: prefix_positions(tensors, model, *DEIT),
         scatter=deit_scatter, keep="|".join((DEIT[0], DEIT[2])), config=deit_out,
         limits={**HF_LIMITS, "registers": (1,), "layer_scale": (0,)}),
  VIT_HF,
  Format("vit/dinov2", "hf", (r"layer_scale1\.lambda1",), dino_describe,
         functools.partial(hf_rows, block=DINO_BLOCK), PREFIXES,
         aside=r"vit\.embeddings\.mask_token", new=HEAD, scatter=dino_scatter, config=dino_out,
         limits=HF_LIMITS),
  Format("vit/timm", "timm", (r"^patch_embed\.proj\.weight", r"^blocks\.0\.attn\.qkv\.weight"),
         timm_describe, timm_rows, (("dist_token", "reg_token"),), aside=r"head_dist\..*", new=HEAD,
         gather=timm_gather, scatter=timm_scatter, config=timm_out,
         limits=dict(norm=("layernorm",))),
]
