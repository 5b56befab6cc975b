"""Our models against recordings of the published implementations (Hugging Face, timm, MAE)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
from tiers import suite

from methods import mae as mae_method
from models import mae, positions, vit

SMALL = dict(image_size=32, channels=3, patch=8, width=64, depth=3, heads=4, mlp_dim=256,
             norm_eps=1e-12)
MAE = dict(**SMALL, positions="learned", decoder_width=48, decoder_depth=2, decoder_heads=4)


@pytest.mark.parametrize("fields", suite([
  {}, {"scan": True}, {"remat": "full"}, {"remat": "dots", "scan": True}], 0, 3))
def test_vit_outputs_loss_and_gradients(fields):
  weights, io = published.load("vit"), published.arrays("vit")
  model = vit.make(**SMALL, num_classes=10, **fields)
  params = published.to_ours("vit/hf", weights, SMALL)[0]
  image = published.nhwc(io["pixel_values"])

  def loss(params):
    logits, out = model.apply({"params": params}, image, return_weights=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, io["labels"]).mean(), logits

  (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, io["logits"], atol=1e-5)
  np.testing.assert_allclose(value, io["loss"], atol=1e-5)
  published.assert_gradients("vit/hf", SMALL, grads, published.arrays("vit", "grads"))


def test_vit_tokens_and_attention():
  weights, io = published.load("vit"), published.arrays("vit")
  params, image = published.to_ours("vit/hf", weights, SMALL)[0], published.nhwc(io["pixel_values"])
  tokens = vit.make(**SMALL, pool="none", class_token=True).apply({"params": params}, image)[0]
  np.testing.assert_allclose(tokens, io["last_hidden_state"], atol=1e-5)
  one = jax.tree.map(lambda x: x[:1], params["transformer"]["blocks"])
  params["transformer"] = {**params["transformer"], "blocks": one}
  model = vit.make(**{**SMALL, "depth": 1}, num_classes=10)
  _, out = model.apply({"params": params}, image, return_weights=True)
  np.testing.assert_allclose(out["weights"], io["attn_0"], atol=1e-5)


def test_vit_at_another_resolution_as_pytorch_resamples():
  weights, io = published.load("vit"), published.arrays("vit", "io_interp")
  model = vit.make(**SMALL, num_classes=10, resample="torch")
  params = published.to_ours("vit/hf", weights, SMALL)[0]
  table = positions.resample(jnp.asarray(params["position"]["table"]), (4, 4), (6, 5), "torch")
  np.testing.assert_allclose(table, io["pos_embed"][0, 1:], atol=1e-5)
  logits, _ = model.apply({"params": params}, published.nhwc(io["pixel_values"]))
  np.testing.assert_allclose(logits, io["logits"], atol=1e-5)


def test_timm_average_pooling():
  weights, io = published.load("vit_timm_avg"), published.arrays("vit_timm_avg")
  fields = {**SMALL, "norm_eps": 1e-6, "pool": "mean", "class_token": True,
            "pool_before_norm": True}
  model = vit.make(**fields, num_classes=10)
  params, _ = published.to_ours("vit/timm", weights, fields)
  image = published.nhwc(io["pixel_values"])

  def loss(params):
    logits, _ = model.apply({"params": params}, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, io["labels"]).mean(), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, io["logits"], atol=1e-5)
  published.assert_gradients("vit/timm", fields, grads,
                             published.arrays("vit_timm_avg", "grads"))


@pytest.fixture(scope="module")
def recorded_mae():
  weights, io = published.load("vitmae"), published.arrays("vitmae")
  return mae.make(**MAE), published.to_ours("mae/hf", weights, MAE)[0], io


def test_mae_mask(recorded_mae):
  io = recorded_mae[2]
  keep, restore, mask = mae.mask_from_noise(jnp.asarray(io["noise"]), 0.75)
  np.testing.assert_array_equal(mask, io["mask"])
  np.testing.assert_array_equal(restore, io["ids_restore"])
  np.testing.assert_array_equal(keep, np.argsort(io["noise"], axis=1)[:, :4])


@pytest.mark.parametrize("norm_pix,case", [(True, "normpix"), (False, "pix")])
def test_mae_loss_and_gradients(recorded_mae, norm_pix, case):
  model, params, io = recorded_mae
  method = mae_method.make(model, norm_pix=norm_pix)
  batch = {"image": published.nhwc(io["pixel_values"]), "noise": io["noise"]}
  loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, _), grads = loss(params, {}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io[f"loss_{case}"], atol=1e-5)
  # Published positions are fixed, so they have no recorded gradient.
  published.assert_gradients("mae/hf", MAE, grads, published.arrays("vitmae", f"grads_{case}"))


def test_mae_reconstruction(recorded_mae):
  model, params, io = recorded_mae
  method = mae_method.make(model, norm_pix=False)
  batch = {"image": published.nhwc(io["pixel_values"]), "noise": io["noise"]}
  out = method.predict["reconstruct"](params, {}, batch, jax.random.key(0))
  np.testing.assert_allclose(out["pred"], io["logits"], atol=1e-5)
  np.testing.assert_array_equal(out["mask"], io["mask"])
  chex.assert_shape(out["image"], (3, 32, 32, 3))


@pytest.mark.parametrize("kind,case,key,grid", [
  ("sincos2d", "sincos_mae", "enc", (4, 4)), ("sincos2d", "sincos_mae", "dec", (4, 4)),
  ("sincos2d_moco", "sincos_moco_v3", "table", (4, 4))])
def test_fixed_positions(kind, case, key, grid):
  table = np.load(published.REFERENCE / f"{case}.npz")[key].reshape(17, -1)[1:]
  np.testing.assert_allclose(positions.FIXED[kind](grid, table.shape[1]), table, atol=1e-6)
