"""BERT for masked language modelling as Hugging Face writes it."""

from collections.abc import Mapping

from interop import formats, vit
from interop.formats import Format, Network
from interop.layout import rows

EMBEDDINGS = [
  ("word_embeddings.weight", "embed/embedding", "v d -> v d"),
  ("position_embeddings.weight", "position", "l d -> l d"),
  ("token_type_embeddings.weight", "segment", "t d -> t d"),
  ("LayerNorm", "embed_norm", "norm"),
]
BLOCK = [
  ("attention.self.{query,key,value}", "attention", "q, k, v"),
  ("attention.output.dense", "attention/out", "heads"),
  ("attention.output.LayerNorm", "attention_norm", "norm"),
  ("intermediate.dense", "mlp/up", "dense"),
  ("output.dense", "mlp/down", "dense"),
  ("output.LayerNorm", "mlp_norm", "norm"),
]
HEAD = [  # the output's embeddings are the input's, and are not written twice
  ("transform.dense", "head", "dense"),
  ("transform.LayerNorm", "head_norm", "norm"),
  ("bias", "bias", "v -> v"),
]
# Files that were converted from the first TensorFlow code call scale and bias of a norm so.
OLD = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def hf_rows(model: Mapping):
  return [*rows(EMBEDDINGS, "bert.embeddings.", "params/encoder"),
          *rows(BLOCK, "bert.encoder.layer.{i}.", "params/encoder/transformer/blocks",
                **vit.sizes(model)),
          *rows(HEAD, "cls.predictions.")]


def hf_describe(shapes, config, given) -> Network:
  """What config.json leaves out are Hugging Face's defaults; special tokens are the paper's."""
  heads = config.get("num_attention_heads", 12) if config else None
  vocab_size, _ = formats.shape(shapes, "bert.embeddings.word_embeddings.weight", 2)
  context, _ = formats.shape(shapes, "bert.embeddings.position_embeddings.weight", 2)
  segments, _ = formats.shape(shapes, "bert.embeddings.token_type_embeddings.weight", 2)
  kind = config.get("position_embedding_type", "absolute")
  if kind != "absolute":
    raise ValueError(f"config.json: position_embedding_type {kind!r}; known is 'absolute'")
  model = dict(name="bert", **formats.tower(
    shapes, "bert.encoder.layer.{i}.intermediate.dense.weight", given, heads,
    config.get("num_hidden_layers")))
  model.update(
    vocab_size=vocab_size, context=context, segments=segments, image_size=(1, 1), channels=1,
    activation=formats.activation(config.get("hidden_act", "gelu")),
    norm_eps=config.get("layer_norm_eps", 1e-12), pad_id=config.get("pad_token_id", 0),
    eos_id=given.get("eos_id", 102), mask_id=given.get("mask_id", 103), starts=1)
  return Network("configs/bert.py:base", model, dict(augment={}))


def hf_out(model, config) -> dict:
  return dict(
    architectures=["BertForMaskedLM"], model_type="bert", hidden_size=model["width"],
    num_hidden_layers=model["depth"], num_attention_heads=model["heads"],
    intermediate_size=model["mlp_dim"], hidden_act=formats.HF_ACTIVATIONS[model["activation"]],
    layer_norm_eps=model["norm_eps"], vocab_size=model["vocab_size"],
    max_position_embeddings=model["context"], type_vocab_size=model["segments"],
    pad_token_id=model["pad_id"], position_embedding_type="absolute")


FORMATS = [
  Format("bert/hf", "hf", (r"bert\.embeddings\.word_embeddings\.weight", r"^cls\.predictions\."),
         hf_describe, hf_rows, suffixes=OLD, config=hf_out, images=False,
         aside=r"bert\.pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\..*"
               r"|bert\.embeddings\.position_ids",
         limits=dict(norm=("layernorm",), placement=("post",), positions=("learned",),
                     segments=(1, 2), embed_norm=(True,), causal=(False,), mask_padding=(True,),
                     layer_scale=(0,), qk_norm=(False,),
                     activation=tuple(formats.HF_ACTIVATIONS))),
]
