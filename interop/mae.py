"""Masked autoencoders as Hugging Face and the original repository write them."""

from collections.abc import Mapping

from interop import formats, layout, vit
from interop.formats import Format, Network
from interop.layout import rows

HF_DECODER = [
  ("decoder.decoder_embed", "embed", "dense"),
  ("decoder.mask_token", "mask_token", vit.IDENTITY),
  ("decoder.decoder_pos_embed", "prefix_position + position/table", "1 n d -> n d"),
  ("decoder.decoder_norm", "transformer/norm", "norm"),
  ("decoder.decoder_pred", "prediction", "dense"),
]
DECODER = [(name.removeprefix("decoder."), ours, kind) for name, ours, kind in HF_DECODER]


def hf_rows(model: Mapping):
  sizes = vit.sizes(model, "decoder_")
  return [*vit.hf_rows(encoder(model), "params/encoder"),
          *rows(HF_DECODER, "", "params/decoder", **sizes),
          *rows(vit.HF_BLOCK, "decoder.decoder_layers.{i}.", "params/decoder/transformer/blocks",
                **sizes)]


def original_rows(model: Mapping):
  sizes = vit.sizes(model, "decoder_")
  return [*vit.timm_rows(encoder(model), "params/encoder"),
          *rows(DECODER, "", "params/decoder", **sizes),
          *rows(vit.TIMM_BLOCK, "decoder_blocks.{i}.", "params/decoder/transformer/blocks",
                **sizes)]


def encoder(model: Mapping) -> dict:
  return {**model, "class_token": True}


def decoder(shapes, given, embed: str, up: str, told) -> dict:
  """Its fields, of which (width, depth, heads) may be `told`; else those of the paper, table 8."""
  width, depth, heads = told
  mlp_dim = None
  if embed in shapes:
    width, _ = formats.shape(shapes, embed, 2)
    mlp_dim, _ = formats.shape(shapes, up.replace("{i}", "0"), 2)
    depth = depth or layout.depth(shapes, up)
    heads = heads or (16 if (width, depth) == (512, 8) else None)
  else:
    width, depth, heads = width or 512, depth or 8, heads or 16
  return dict(decoder_width=width, decoder_depth=depth, decoder_mlp_dim=mlp_dim or 4 * width,
              decoder_heads=formats.need(given, "decoder_heads", heads))


def network(model: dict, config: Mapping, norm_pix) -> Network:
  """Published positions are fixed, so they stay as they are in training."""
  model.update(positions="learned", pool="mean")
  method = dict(mask_ratio=config.get("mask_ratio", 0.75), norm_pix=norm_pix is not False)
  return Network("configs/mae.py:imagenet_b16", model, dict(
    method=method, augment=formats.IMAGENET, optimizer=dict(frozen="position")))


def hf_describe(shapes, config, given) -> Network:
  model = vit.hf_model(shapes, config, given, name="mae")
  model |= decoder(shapes, given, "decoder.decoder_embed.weight",
                   "decoder.decoder_layers.{i}.intermediate.dense.weight",
                   [config.get(f"decoder_{name}") for name in (
                     "hidden_size", "num_hidden_layers", "num_attention_heads")])
  return network(model, config, config.get("norm_pix_loss"))


def original_describe(shapes, config, given) -> Network:
  model = vit.timm_model(shapes, config, given, name="mae")
  model |= decoder(shapes, given, "decoder_embed.weight", "decoder_blocks.{i}.mlp.fc1.weight",
                   [config.get(f"decoder_{name}") for name in (
                     "embed_dim", "depth", "num_heads")])
  return network(model, config, config.get("norm_pix_loss"))


def hf_out(model, config) -> dict:
  return dict(architectures=["ViTMAEForPreTraining"], model_type="vit_mae",
              decoder_hidden_size=model["decoder_width"],
              decoder_num_hidden_layers=model["decoder_depth"],
              decoder_num_attention_heads=model["decoder_heads"],
              decoder_intermediate_size=model["decoder_mlp_dim"],
              mask_ratio=config.method.get("mask_ratio", 0.75),
              norm_pix_loss=config.method.get("norm_pix", True), **vit.hf_out(model, config))


NEW = "params/decoder"
FORMATS = [
  Format("mae/hf", "hf", (r"decoder\.mask_token",), hf_describe, hf_rows,
         (*vit.PREFIXES, ("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")), new=NEW,
         config=hf_out),
  Format("mae/original", "original", (r"^decoder_embed\.weight", r"^patch_embed\.proj\.weight"),
         original_describe, original_rows, new=NEW),
]
