"""CLIP and SigLIP as Hugging Face, OpenAI and OpenCLIP write them."""

from collections.abc import Mapping

from interop import formats, vit
from interop.formats import Format, Network
from interop.layout import rows

# --- Hugging Face ---------------------------------------------------------------------------------

HF_BLOCK = [
  ("layer_norm1", "attention_norm", "norm"),
  ("self_attn.{q_proj,k_proj,v_proj}", "attention", "q, k, v"),
  ("self_attn.out_proj", "attention/out", "heads"),
  ("layer_norm2", "mlp_norm", "norm"),
  ("mlp.fc1", "mlp/up", "dense"),
  ("mlp.fc2", "mlp/down", "dense"),
]
HF_IMAGE = [
  ("embeddings.class_embedding", "cls", "d -> 1 1 d"),
  ("embeddings.patch_embedding", "embed/projection", "patches"),
  ("pre_layrnorm", "input_norm", "norm"),  # spelt so
  ("post_layernorm", "transformer/norm", "norm"),
  ("head.probe", "map_pool/probe", vit.IDENTITY),
  ("head.attention.in_proj", "map_pool/attention", "in_proj"),
  ("head.attention.out_proj", "map_pool/attention/out", "heads"),
  ("head.layernorm", "map_pool/norm", "norm"),
  ("head.mlp.fc1", "map_pool/mlp/up", "dense"),
  ("head.mlp.fc2", "map_pool/mlp/down", "dense"),
]
HF_TEXT = [
  ("embeddings.token_embedding.weight", "embed/embedding", "v d -> v d"),
  ("embeddings.position_embedding.weight", "position", "l d -> l d"),
  ("final_layer_norm", "transformer/norm", "norm"),
]


def hf_towers(model: Mapping):
  image = HF_IMAGE + vit.position("embeddings.position_embedding.weight", model, "n d -> n d")
  layers = "encoder.layers.{i}."
  return [*rows(image, "vision_model.", "params/image", **vit.sizes(model)),
          *rows(HF_BLOCK, f"vision_model.{layers}", "params/image/transformer/blocks",
                **vit.sizes(model)),
          *rows(HF_TEXT, "text_model.", "params/text"),
          *rows(HF_BLOCK, f"text_model.{layers}", "params/text/transformer/blocks",
                **vit.sizes(model, "text_"))]


def hf_rows(model: Mapping):
  return [*hf_towers(model), *rows([
    ("logit_scale", "logit_scale", "->"),
    ("visual_projection", "image_projection", "dense"),
    ("text_projection", "text_projection", "dense")])]


def siglip_rows(model: Mapping):
  return [*hf_towers(model), *rows([
    ("logit_scale", "logit_scale", "1 ->"),
    ("logit_bias", "logit_bias", "1 ->"),
    ("text_model.head", "text_projection", "dense")])]


def hf_model(shapes, vision: Mapping, words: Mapping, given, norm_eps, act, heads, prefix) -> dict:
  """Both towers. What a config.json leaves out are the defaults of Hugging Face's classes."""
  up = "encoder.layers.{i}.mlp.fc1.weight"
  model = dict(name="clip", **formats.patches(
    shapes, "vision_model.embeddings.patch_embedding.weight") | formats.tower(
      shapes, f"vision_model.{up}", given, vision.get("num_attention_heads", heads[0]),
      vision.get("num_hidden_layers")))
  text = formats.tower(shapes, f"text_model.{up}", given,
                       words.get("num_attention_heads", heads[1]),
                       words.get("num_hidden_layers"), prefix="text_")
  vocab_size, _ = formats.shape(shapes, "text_model.embeddings.token_embedding.weight", 2)
  context, _ = formats.shape(shapes, "text_model.embeddings.position_embedding.weight", 2)
  positions, _ = formats.shape(shapes, "vision_model.embeddings.position_embedding.weight", 2)
  return model | {f"text_{name}": value for name, value in text.items()} | dict(
    vocab_size=vocab_size, context=context, norm_eps=vision.get("layer_norm_eps", norm_eps),
    text_norm_eps=words.get("layer_norm_eps", norm_eps),
    activation=formats.activation(vision.get("hidden_act", act)),
    text_activation=formats.activation(words.get("hidden_act", act)),
    image_size=formats.image_size(positions, (prefix,), model["patch"], given,
                                  vision.get("image_size")))


def hf_describe(shapes, config, given) -> Network:
  vision, words = config.get("vision_config") or {}, config.get("text_config") or {}
  heads = (12, 8) if config else (None, None)
  model = hf_model(shapes, vision, words, given, 1e-5, "quick_gelu", heads, 1)
  end = words.get("eos_token_id", 49407)
  # Hugging Face's own sign of OpenAI's rule: the end of a text is its largest id.
  model.update(embed_dim=formats.shape(shapes, "text_projection.weight", 2)[0],
               text_pool="argmax" if end == 2 else "eos", eos_id=end,
               pad_id=words.get("pad_token_id", 1))
  return clip(model)


def clip(model: dict) -> Network:
  model.update(pre_norm=True, patch_bias=False, pool="cls")
  return Network("configs/clip.py:vit_b32", model, dict(augment=CLIP_PIXELS))


CLIP_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073),
                   std=(0.26862954, 0.26130258, 0.27577711))


def siglip_describe(shapes, config, given) -> Network:
  vision, words = config.get("vision_config") or {}, config.get("text_config") or {}
  heads = (12, 12) if config else (None, None)
  model = hf_model(shapes, vision, words, given, 1e-6, "gelu_pytorch_tanh", heads, 0)
  model.update(
    pool="map", embed_dim=formats.shape(shapes, "text_model.head.weight", 2)[0],
    project_image=False, projection_bias=True, text_causal=False, text_pool="last",
    text_clip_init=False, init_scale=10.0, init_bias=-10.0, eos_id=words.get("eos_token_id", 1),
    pad_id=words.get("pad_token_id", 1))
  return Network("configs/clip.py:siglip_b16", model, dict(augment=formats.HALF))


def hf_out(model, config) -> dict:
  """config.json of CLIP, or of SigLIP for towers that end in attention pooling."""
  siglip = model.get("pool") == "map"
  kind = "siglip" if siglip else "clip"
  act = formats.HF_ACTIVATIONS[model["activation"]]
  text_act = formats.HF_ACTIVATIONS[model.get("text_activation", model["activation"])]
  words = dict(
    hidden_size=model["text_width"], num_hidden_layers=model["text_depth"],
    num_attention_heads=model["text_heads"],
    intermediate_size=model.get("text_mlp_dim", 4 * model["text_width"]), hidden_act=text_act,
    layer_norm_eps=model.get("text_norm_eps", model["norm_eps"]), vocab_size=model["vocab_size"],
    max_position_embeddings=model["context"], model_type=f"{kind}_text_model",
    eos_token_id=2 if model.get("text_pool") == "argmax" else model["eos_id"],
    pad_token_id=model["pad_id"])
  vision = {name: value for name, value in vit.hf_out(model, config).items() if name != "qkv_bias"}
  vision.update(hidden_act=act, model_type=f"{kind}_vision_model")
  words["projection_size" if siglip else "projection_dim"] = model["embed_dim"]
  top = {} if siglip else dict(projection_dim=model["embed_dim"])
  vision |= top
  return dict(architectures=["SiglipModel" if siglip else "CLIPModel"], model_type=kind,
              text_config=words, vision_config=vision, **top)


# --- OpenAI and OpenCLIP --------------------------------------------------------------------------

BLOCK = [
  ("ln_1", "attention_norm", "norm"),
  ("attn.in_proj", "attention", "in_proj"),
  ("attn.out_proj", "attention/out", "heads"),
  ("ln_2", "mlp_norm", "norm"),
  ("mlp.c_fc", "mlp/up", "dense"),
  ("mlp.c_proj", "mlp/down", "dense"),
]
CLIP = [
  ("visual.class_embedding", "image/cls", "d -> 1 1 d"),
  ("visual.positional_embedding", "image/cls_position + image/position/table", "n d -> n d"),
  ("visual.conv1", "image/embed/projection", "patches"),
  ("visual.ln_pre", "image/input_norm", "norm"),
  ("visual.ln_post", "image/transformer/norm", "norm"),
  ("visual.proj", "image_projection/kernel", "i o -> i o"),  # Hugging Face's transposed
  ("token_embedding.weight", "text/embed/embedding", "v d -> v d"),
  ("positional_embedding", "text/position", "l d -> l d"),
  ("ln_final", "text/transformer/norm", "norm"),
  ("text_projection", "text_projection/kernel", "i o -> i o"),
  ("logit_scale", "logit_scale", "->"),
]


def openai_rows(model: Mapping):
  return [*rows(CLIP, **vit.sizes(model)),
          *rows(BLOCK, "visual.transformer.resblocks.{i}.", "params/image/transformer/blocks",
                **vit.sizes(model)),
          *rows(BLOCK, "transformer.resblocks.{i}.", "params/text/transformer/blocks",
                **vit.sizes(model, "text_"))]


def openai_describe(shapes, config, given) -> Network:
  """OpenAI's heads have 64 features; OpenCLIP's config says what differs."""
  config = config.get("model_cfg") or config
  vision, words = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
  up = "transformer.resblocks.{i}.mlp.c_fc.weight"
  embed = formats.patches(shapes, "visual.conv1.weight")
  own = "input_resolution" in shapes  # OpenAI's files say it; OpenCLIP's do not
  heads = embed["width"] // vision.get("head_width", 64) if vision or own else None
  model = dict(name="clip", **embed | formats.tower(shapes, f"visual.{up}", given, heads,
                                                    vision.get("layers")))
  text_width = formats.shape(shapes, "ln_final.weight", 1)[0]
  text_heads = words.get("heads", text_width // 64 if words or own else None)
  text = formats.tower(shapes, up, given, text_heads, words.get("layers"), prefix="text_")
  vocab_size, _ = formats.shape(shapes, "token_embedding.weight", 2)
  context, _ = formats.shape(shapes, "positional_embedding", 2)
  positions, _ = formats.shape(shapes, "visual.positional_embedding", 2)
  quick = config.get("quick_gelu", None if not (vision or words) else False)
  known = "quick_gelu" if own or quick else None if quick is None else "gelu"
  model |= {f"text_{name}": value for name, value in text.items()} | dict(
    vocab_size=vocab_size, context=context, norm_eps=1e-5, text_pool="argmax",
    activation=formats.need(given, "activation", known), eos_id=vocab_size - 1, pad_id=0,
    embed_dim=formats.shape(shapes, "text_projection", 2)[1],
    image_size=formats.image_size(positions, (1,), model["patch"], given,
                                  vision.get("image_size")))
  return clip(model)


def openai_out(model, config) -> dict:
  """OpenCLIP's description of a model."""
  return dict(
    embed_dim=model["embed_dim"], quick_gelu=model["activation"] == "quick_gelu",
    vision_cfg=dict(image_size=model["image_size"][0], layers=model["depth"], width=model["width"],
                    head_width=model["width"] // model["heads"], patch_size=model["patch"],
                    mlp_ratio=model["mlp_dim"] / model["width"]),
    text_cfg=dict(context_length=model["context"], vocab_size=model["vocab_size"],
                  width=model["text_width"], heads=model["text_heads"],
                  layers=model["text_depth"]))


IDS = r"(text|vision)_model\.embeddings\.position_ids"
COMMON = dict(norm=("layernorm",), registers=(0,), layer_scale=(0,), qk_norm=(False,),
              text_mask_padding=(False,))
CLIP_LIMITS = dict(**COMMON, pool=("cls",), pre_norm=(True,), patch_bias=(False,),
                   projection_bias=(False,), text_pool=("eos", "argmax"), text_causal=(True,))
SIGLIP_LIMITS = dict(**COMMON, pool=("map",), class_token=(None, False), pre_norm=(False,),
                     project_image=(False,), projection_bias=(True,), text_pool=("last",),
                     text_causal=(False,))
FORMATS = [
  Format("clip/hf", "hf", (r"^vision_model\.pre_layrnorm\.", r"^text_model\."), hf_describe,
         hf_rows, aside=IDS, config=hf_out, limits=CLIP_LIMITS),
  Format("clip/siglip", "hf", (r"^vision_model\.head\.probe", r"^text_model\."), siglip_describe,
         siglip_rows, aside=IDS, config=hf_out, limits=SIGLIP_LIMITS),
  Format("clip/openai", "openai", (r"^visual\.class_embedding",), openai_describe, openai_rows,
         (("text.", ""),), aside="input_resolution|context_length|vocab_size|attn_mask",
         config=openai_out, limits=CLIP_LIMITS),
]
