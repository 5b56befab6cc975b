"""Published state dicts in our layout, and our gradients compared in theirs."""

from pathlib import Path

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


def patch_embed(weights, name):
  kernel = weights[f"{name}.weight"]                                         # d c p q
  return {"projection": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]),
                         "bias": weights[f"{name}.bias"]}}


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


def assert_gradients(to_ours, weights, ours, recorded, skip=()):
  """Every published parameter's gradient, to 1e-4 of its largest recorded number.

  Key biases have no gradient but rounding (softmax cancels them): both must be that small.
  """
  theirs = in_their_layout(to_ours, weights, ours)
  assert set(recorded) - set(skip) <= set(theirs)
  largest = max(np.abs(g).max() for g in recorded.values())
  for name, expected in recorded.items():
    if name in skip:
      continue
    actual = thinned(theirs[name])
    if name.endswith("key.bias"):
      assert np.abs(actual).max() < 1e-6 * largest and np.abs(expected).max() < 1e-6 * largest
      continue
    scale = np.abs(expected).max()
    assert scale > 1e-6 * largest, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale, err_msg=name)
