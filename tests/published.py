"""Published state dicts in our layout, and our gradients compared in theirs."""

import re
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import load_file

REFERENCE = Path(__file__).parent / "reference"


def load(case: str) -> dict[str, np.ndarray]:
  return load_file(REFERENCE / case / "model.safetensors")


def arrays(case: str, name: str = "io") -> dict[str, np.ndarray]:
  return dict(np.load(REFERENCE / case / f"{name}.npz"))


def nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


def dense(weights, name):
  return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def norm(weights, name):
  return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def patch_kernel(weights, name):
  kernel = weights[f"{name}.weight"]                                         # d c p q
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def patch_embed(weights, name):
  return {"projection": {"kernel": patch_kernel(weights, name), "bias": weights[f"{name}.bias"]}}


def attention(q, k, v, out, heads):
  """Each of q, k, v, out a (weight [out, in], bias) pair."""
  d = q[0].shape[1]
  kernel = np.stack([w.T.reshape(d, heads, -1) for w, _ in (q, k, v)], axis=1)  # d 3 k h
  bias = np.stack([b.reshape(heads, -1) for _, b in (q, k, v)])
  return {"qkv_kernel": kernel, "qkv_bias": bias,
          "out": {"kernel": out[0].T.reshape(heads, -1, d), "bias": out[1]}}


def hf_stack(weights, prefix, heads):
  """Hugging Face's ViT layers -> our stacked blocks."""
  def layer(p):
    def pair(name):
      return weights[f"{p}.{name}.weight"], weights[f"{p}.{name}.bias"]
    a = "attention.attention"
    return {"attention": attention(pair(f"{a}.query"), pair(f"{a}.key"), pair(f"{a}.value"),
                                   pair("attention.output.dense"), heads),
            "attention_norm": norm(weights, f"{p}.layernorm_before"),
            "mlp_norm": norm(weights, f"{p}.layernorm_after"),
            "mlp": {"up": dense(weights, f"{p}.intermediate.dense"),
                    "down": dense(weights, f"{p}.output.dense")}}
  return stack(layer, weights, prefix)


def timm_stack(weights, prefix, heads):
  def layer(p):
    w, b = weights[f"{p}.attn.qkv.weight"], weights[f"{p}.attn.qkv.bias"]
    return {"attention": attention(*zip(np.split(w, 3), np.split(b, 3)),
                                   (weights[f"{p}.attn.proj.weight"],
                                    weights[f"{p}.attn.proj.bias"]), heads),
            "attention_norm": norm(weights, f"{p}.norm1"), "mlp_norm": norm(weights, f"{p}.norm2"),
            "mlp": {"up": dense(weights, f"{p}.mlp.fc1"), "down": dense(weights, f"{p}.mlp.fc2")}}
  return stack(layer, weights, prefix)


def stack(layer, weights, prefix):
  depth = 1 + max(int(name[len(prefix):].split(".")[1]) for name in weights
                  if name.startswith(f"{prefix}."))
  return jax.tree.map(lambda *x: np.stack(x), *(layer(f"{prefix}.{i}") for i in range(depth)))


def tokens(cls, table, prefix="cls"):
  return {prefix: cls, f"{prefix}_position": table[:, :1], "position": {"table": table[0, 1:]}}


def hf_encoder(weights, heads):
  e = "vit.embeddings"
  return {**tokens(weights[f"{e}.cls_token"], weights[f"{e}.position_embeddings"]),
          "embed": patch_embed(weights, f"{e}.patch_embeddings.projection"),
          "transformer": {"blocks": hf_stack(weights, "vit.encoder.layer", heads),
                          "norm": norm(weights, "vit.layernorm")}}


def hf_vit(weights, heads):
  return {**hf_encoder(weights, heads), "head": dense(weights, "classifier")}


def hf_mae(weights, heads, decoder_heads):
  table = weights["decoder.decoder_pos_embed"]
  return {"encoder": hf_encoder(weights, heads),
          "decoder": {"embed": dense(weights, "decoder.decoder_embed"),
                      "mask_token": weights["decoder.mask_token"],
                      "prefix_position": table[:, :1], "position": {"table": table[0, 1:]},
                      "prediction": dense(weights, "decoder.decoder_pred"),
                      "transformer": {
                        "blocks": hf_stack(weights, "decoder.decoder_layers", decoder_heads),
                        "norm": norm(weights, "decoder.decoder_norm")}}}


def timm_vit(weights, heads):
  return {**tokens(weights["cls_token"], weights["pos_embed"]),
          "embed": patch_embed(weights, "patch_embed.proj"),
          "transformer": {"blocks": timm_stack(weights, "blocks", heads)},
          "pool_norm": norm(weights, "fc_norm"), "head": dense(weights, "head")}


def in_their_layout(to_ours, weights, ours) -> dict[str, np.ndarray]:
  """A tree in our layout under the published names, flat.

  `to_ours` only moves numbers about, so feeding it the numbers' places says where each one went.
  """
  start, places = 0, {}
  for name, w in weights.items():
    places[name] = np.arange(start, start + w.size, dtype=np.int64).reshape(w.shape)
    start += w.size
  flat = np.full(start, np.nan)
  jax.tree.map(lambda place, x: flat.__setitem__(place.ravel(), np.asarray(x).ravel()),
               to_ours(places), ours)
  return {name: flat[place.ravel()] for name, place in places.items()}


def thinned(flat: np.ndarray) -> np.ndarray:
  """The numbers of a parameter that the recordings keep: at most 64, evenly spaced."""
  return flat[::max(1, -(-flat.size // 64))]


def assert_gradients(to_ours, weights, ours, recorded, skip=(), cancelled=()):
  """Every published parameter's gradient, to 1e-4 of its largest recorded number.

  Key biases have no gradient but rounding (softmax cancels them), nor have those `cancelled` by
  something else: both must be that small.
  """
  theirs = in_their_layout(to_ours, weights, ours)
  assert set(recorded) - set(skip) <= set(theirs)
  largest = max(np.abs(g).max() for g in recorded.values())
  for name, expected in recorded.items():
    if name in skip:
      continue
    actual = theirs[name].ravel() if expected.size == theirs[name].size else thinned(theirs[name])
    if name.endswith(("key.bias", *cancelled)):
      assert np.abs(actual).max() < 1e-6 * largest and np.abs(expected).max() < 1e-6 * largest
      continue
    scale = np.abs(expected).max()
    assert scale > 1e-6 * largest, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale, err_msg=name)


# --- DiT ------------------------------------------------------------------------------------------

def dit(weights, heads):
  """facebookresearch/DiT -> ours; its position table as a learned one, so that it can be any."""
  def layer(p):
    w, b = weights[f"{p}.attn.qkv.weight"], weights[f"{p}.attn.qkv.bias"]
    out = weights[f"{p}.attn.proj.weight"], weights[f"{p}.attn.proj.bias"]
    return {"attention": attention(*zip(np.split(w, 3), np.split(b, 3)), out, heads),
            "mlp": {"up": dense(weights, f"{p}.mlp.fc1"), "down": dense(weights, f"{p}.mlp.fc2")},
            "modulation": dense(weights, f"{p}.adaLN_modulation.1")}
  return {"embed": patch_embed(weights, "x_embedder.proj"),
          "position": {"table": weights["pos_embed"][0]},
          "condition": {"time_in": dense(weights, "t_embedder.mlp.0"),
                        "time_out": dense(weights, "t_embedder.mlp.2"),
                        "label": {"embedding": weights["y_embedder.embedding_table.weight"]}},
          "blocks": stack(layer, weights, "blocks"),
          "final": {"modulation": dense(weights, "final_layer.adaLN_modulation.1"),
                    "projection": dense(weights, "final_layer.linear")}}


# --- MoCo -----------------------------------------------------------------------------------------

TORCHVISION_RESNET = [
  (r"^conv1", "stem"), (r"^bn1", "stem_norm"),
  (r"layer(\d)\.(\d)\.", lambda m: f"stage_{int(m[1]) - 1}/block_{m[2]}/"),
  (r"conv(\d)", lambda m: f"conv_{int(m[1]) - 1}"), (r"bn(\d)", lambda m: f"norm_{int(m[1]) - 1}"),
  (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut_norm"), (r"^fc$", "head")]


def renamed(weights, patterns):
  """(params, batch statistics) of a network whose modules `patterns` rename one by one."""
  leaves = {4: ("kernel", (2, 3, 1, 0)), 2: ("kernel", (1, 0)), 1: ("scale", (0,))}
  params, stats = {}, {}
  for name, w in weights.items():
    module, leaf = name.rsplit(".", 1)
    for pattern, ours in patterns:
      module = re.sub(pattern, ours, module)
    if leaf.startswith("running_"):
      stats[f"{module}/{leaf.removeprefix('running_')}"] = w
    elif leaf != "num_batches_tracked":
      leaf, order = leaves[w.ndim] if leaf == "weight" else (leaf, (0,))
      params[f"{module}/{leaf}"] = w.transpose(order)
  return tuple(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in (params, stats))


def inside(weights, prefix):
  """The weights whose names begin with `prefix`, without it."""
  return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def only(weights, prefix):
  """The weights whose names begin with `prefix`."""
  return {name: w for name, w in weights.items() if name.startswith(prefix)}


def moco_resnet(weights, encoder="encoder_q"):
  """facebookresearch/moco -> ours: (params, batch statistics) of an encoder."""
  weights = inside(weights, f"{encoder}.")
  body, stats = renamed({n: w for n, w in weights.items() if not n.startswith("fc.")},
                        TORCHVISION_RESNET)
  names = sorted({name.rsplit(".", 1)[0] for name in weights if name.startswith("fc.")})
  projector = {f"dense_{i}": dense(weights, name) for i, name in enumerate(names)}
  return {"backbone": body, "projector": projector}, {"backbone": stats}


def moco_v3_head(weights, prefix):
  """Layers (dense, norm, ReLU) of facebookresearch/moco-v3 -> (params, batch statistics)."""
  count = len({name for name in weights if name.startswith(f"{prefix}.") and
               name.endswith("running_mean")})
  params, stats = {}, {}
  for i in range(count):
    dense_name, norm_name = f"{prefix}.{3 * i}", f"{prefix}.{3 * i + 1}"
    params[f"dense_{i}"] = {"kernel": weights[f"{dense_name}.weight"].T}
    if f"{norm_name}.weight" in weights:
      params[f"norm_{i}"] = norm(weights, norm_name)
    stats[f"norm_{i}"] = {"mean": weights[f"{norm_name}.running_mean"],
                          "var": weights[f"{norm_name}.running_var"]}
  return params, stats


def moco_v3_vit(weights, heads, encoder="base_encoder"):
  """facebookresearch/moco-v3 -> ours: (params, batch statistics); the predictor with the base."""
  encoder_weights = inside(weights, f"{encoder}.")
  head, head_stats = moco_v3_head(encoder_weights, "head")
  params = {"projector": head, "backbone": {
    **tokens(encoder_weights["cls_token"], encoder_weights["pos_embed"]),
    "embed": patch_embed(encoder_weights, "patch_embed.proj"),
    "transformer": {"blocks": timm_stack(encoder_weights, "blocks", heads),
                    "norm": norm(encoder_weights, "norm")}}}
  stats = {"projector": head_stats}
  if encoder == "base_encoder":
    params["predictor"], stats["predictor"] = moco_v3_head(weights, "predictor")
  return params, stats


# --- CLIP, SigLIP ---------------------------------------------------------------------------------

def clip_stack(weights, prefix, heads):
  """Hugging Face's CLIP and SigLIP layers -> our stacked blocks."""
  def layer(p):
    qkvo = [(weights[f"{p}.self_attn.{name}.weight"], weights[f"{p}.self_attn.{name}.bias"])
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return {"attention": attention(*qkvo, heads),
            "attention_norm": norm(weights, f"{p}.layer_norm1"),
            "mlp_norm": norm(weights, f"{p}.layer_norm2"),
            "mlp": {"up": dense(weights, f"{p}.mlp.fc1"), "down": dense(weights, f"{p}.mlp.fc2")}}
  return stack(layer, weights, f"{prefix}.layers")


def hf_text(weights, heads):
  return {"embed": {"embedding": weights["text_model.embeddings.token_embedding.weight"]},
          "position": weights["text_model.embeddings.position_embedding.weight"],
          "transformer": {"blocks": clip_stack(weights, "text_model.encoder", heads),
                          "norm": norm(weights, "text_model.final_layer_norm")}}


def hf_clip(weights, heads):
  e = "vision_model.embeddings"
  return {
    "image": {
      **tokens(weights[f"{e}.class_embedding"][None, None],
               weights[f"{e}.position_embedding.weight"][None]),
      "embed": {"projection": {"kernel": patch_kernel(weights, f"{e}.patch_embedding")}},
      "input_norm": norm(weights, "vision_model.pre_layrnorm"),
      "transformer": {"blocks": clip_stack(weights, "vision_model.encoder", heads),
                      "norm": norm(weights, "vision_model.post_layernorm")}},
    "text": hf_text(weights, heads), "logit_scale": weights["logit_scale"],
    "image_projection": {"kernel": weights["visual_projection.weight"].T},
    "text_projection": {"kernel": weights["text_projection.weight"].T}}


def hf_siglip(weights, heads):
  e, h = "vision_model.embeddings", "vision_model.head"
  qkv = zip(np.split(weights[f"{h}.attention.in_proj_weight"], 3),
            np.split(weights[f"{h}.attention.in_proj_bias"], 3))
  out = tuple(weights[f"{h}.attention.out_proj.{name}"] for name in ("weight", "bias"))
  return {
    "image": {
      "position": {"table": weights[f"{e}.position_embedding.weight"]},
      "embed": patch_embed(weights, f"{e}.patch_embedding"),
      "transformer": {"blocks": clip_stack(weights, "vision_model.encoder", heads),
                      "norm": norm(weights, "vision_model.post_layernorm")},
      "map_pool": {"probe": weights[f"{h}.probe"], "attention": attention(*qkv, out, heads),
                   "norm": norm(weights, f"{h}.layernorm"),
                   "mlp": {"up": dense(weights, f"{h}.mlp.fc1"),
                           "down": dense(weights, f"{h}.mlp.fc2")}}},
    "text": hf_text(weights, heads), "text_projection": dense(weights, "text_model.head"),
    "logit_scale": weights["logit_scale"][0], "logit_bias": weights["logit_bias"][0]}


def hf_from_openai(weights):
  """OpenAI's CLIP under Hugging Face's names."""
  layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
           "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
  names = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
           "visual.conv1": "vision_model.embeddings.patch_embedding",
           "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
           "visual.ln_pre": "vision_model.pre_layrnorm",
           "visual.ln_post": "vision_model.post_layernorm",
           "token_embedding": "text_model.embeddings.token_embedding",
           "positional_embedding": "text_model.embeddings.position_embedding.weight",
           "ln_final": "text_model.final_layer_norm"}
  renamed = {"logit_scale": weights["logit_scale"],
             "visual_projection.weight": weights["visual.proj"].T,
             "text_projection.weight": weights["text_projection"].T}
  for name, w in weights.items():
    if found := re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", name):
      prefix = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
      part, _, leaf = found[3].rpartition(".")
      if found[3].startswith("attn.in_proj_"):
        for letter, piece in zip("qkv", np.split(w, 3)):
          renamed[f"{prefix}.self_attn.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = piece
      else:
        renamed[f"{prefix}.{layer[part]}.{leaf}"] = w
    elif name in names:
      renamed[names[name]] = w
    elif (part := name.rpartition("."))[0] in names:
      renamed[f"{names[part[0]]}.{part[2]}"] = w
  return renamed
