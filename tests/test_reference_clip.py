"""CLIP and SigLIP against recordings of Hugging Face's implementations and of OpenAI's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from methods import clip as method_module
from models import clip

TINY = dict(image_size=32, channels=3, patch=8, depth=3, heads=4, width=64, mlp_dim=256,
            vocab_size=200, context=16, text_width=48, text_depth=2, text_heads=4)
CLIP = {**clip.VARIANTS["CLIP-B/32"], **TINY, "embed_dim": 40}
SIGLIP = {**clip.VARIANTS["SigLIP-B/16"], **TINY, "width": 48, "depth": 2, "mlp_dim": 192,
          "embed_dim": 48, "eos_id": 1, "pad_id": 1}
CASES = {  # recording -> how its texts are pooled and which tokens are padding
  "clip_eos": dict(text_pool="eos", eos_id=150, pad_id=150),
  "clip_legacy": dict(text_pool="argmax", eos_id=2, pad_id=0),
}


def build(fields):
  return clip.make(**{name: value for name, value in fields.items() if name != "variant"})


def load(case):
  """(weights, params)."""
  if case == "clip_legacy":  # its weights are those of the recording in OpenAI's layout
    weights = published.load("clip_openai_layout")
    return weights, published.to_ours("clip/openai", weights, CLIP)[0]
  weights = published.load(case)
  return weights, published.to_ours("clip/hf", weights, CLIP)[0]


def batch_of(io):
  return {"image": published.nhwc(io["pixel_values"]), "text": io["input_ids"].astype(np.int32)}


def forward(model, params, batch):
  """(the model's output, tokens of the text tower)."""
  return jax.jit(lambda *args: model.apply(*args, method=lambda model, image, ids: (
    model(image, ids), model.text(ids)[1]["tokens"])))({"params": params}, *batch.values())


@pytest.mark.parametrize("case,masked,chunk", [
  ("clip_eos", False, 0), pytest.param("clip_eos", True, 2, marks=pytest.mark.slow),
  pytest.param("clip_legacy", False, 2, marks=pytest.mark.slow), ("clip_legacy", True, 0)])
def test_clip(case, masked, chunk):
  (weights, params), io = load(case), published.arrays(case)
  model = build({**CLIP, **CASES[case], "text_mask_padding": masked})
  method = method_module.make(model, batch_size=4, chunk=chunk)
  batch = batch_of(io)
  suffix = "mask" if masked else "nomask"

  (image, text, logit_scale, bias), tokens = forward(model, params, batch)
  np.testing.assert_allclose(image, io[f"image_embeds_{suffix}"], atol=1e-5)
  np.testing.assert_allclose(text, io[f"text_embeds_{suffix}"], atol=1e-5)
  np.testing.assert_allclose(jnp.exp(logit_scale) * image @ text.T,
                             io[f"logits_per_image_{suffix}"], atol=1e-5)
  assert bias is None
  np.testing.assert_allclose(tokens, io[f"text_last_hidden_{suffix}"], atol=1e-5)

  loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, (extra, metrics)), grads = loss(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io[f"loss_{suffix}"], atol=1e-5)
  np.testing.assert_allclose(metrics["logit_scale"], np.exp(weights["logit_scale"]), rtol=1e-5)
  own = io[f"logits_per_image_{suffix}"].argmax(1) == np.arange(4)
  assert extra == {} and metrics["top1"] == own.mean()
  # Padding is never seen by a causal tower's features: both have the same gradients.
  published.assert_gradients("clip/hf", CLIP, grads, published.arrays(case, "grads"),
                             cancelled=("k_proj.bias",))


def test_openai_layout():
  (_, params), io = load("clip_legacy"), published.arrays("clip_openai_layout")
  method = method_module.make(build({**CLIP, **CASES["clip_legacy"]}), batch_size=4)
  batch = batch_of(io)
  for name, recorded in (("embed_image", io["image_features"]),
                         ("embed_text", io["text_features"])):
    ours = jax.jit(method.predict[name])(params, {}, batch, None)
    norm = np.linalg.norm(recorded, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, recorded / norm, atol=1e-5)
  np.testing.assert_allclose(method.predict["logit_scale"](params, {}, {}, None),
                             io["logit_scale"], rtol=1e-5)
  value, _ = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io["loss"], atol=1e-5)


@pytest.mark.parametrize("chunk,fields", [(0, {}), (2, {"scan": True})])
def test_siglip(chunk, fields):
  weights, io = published.load("siglip"), published.arrays("siglip")
  model = build({**SIGLIP, **fields})
  params, batch = published.to_ours("clip/siglip", weights, SIGLIP)[0], batch_of(io)
  (image, text, logit_scale, bias), tokens = forward(model, params, batch)
  np.testing.assert_allclose(image, io["image_embeds"], atol=1e-5)
  np.testing.assert_allclose(text, io["text_embeds"], atol=1e-5)
  np.testing.assert_allclose(jnp.exp(logit_scale) * image @ text.T + bias, io["logits_per_image"],
                             atol=1e-5)
  np.testing.assert_allclose(tokens, io["text_last_hidden"], atol=1e-5)
  method = method_module.make(model, batch_size=4, loss="sigmoid", chunk=chunk,
                              max_logit_scale=None)
  loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, _), grads = loss(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io["loss"], atol=1e-5)
  published.assert_gradients("clip/siglip", SIGLIP, grads, published.arrays("siglip", "grads"),
                             cancelled=("k_proj.bias",))
