"""ResNet and its batch norm against recordings of Hugging Face's and torchvision's layout."""

import jax
import numpy as np
import published
import pytest

from methods import supervised
from models import resnet

CASES = {  # our fields, the format
  "resnet": (dict(widths=(4, 6, 8, 12), stem_width=16), "resnet/hf"),
  "resnet_torchvision_layout": (dict(widths=(8, 8, 12, 16), stem_width=64), "resnet/torchvision"),
}
DEPTHS = dict(depths=(1, 2, 1, 1))


@pytest.fixture(scope="module", params=CASES)
def case(request):
  fields, form = CASES[request.param]
  weights, io = published.load(request.param), published.arrays(request.param)
  model = resnet.make(variant="50", image_size=48, channels=3, num_classes=6, **DEPTHS,
                      **fields)
  params, extra = published.to_ours(form, weights, DEPTHS)
  stats = extra["batch_stats"]
  batch = {"image": published.nhwc(io["pixel_values"]), "label": io["labels"]}
  return request.param, weights, io, model, params, stats, batch


def test_our_layout_is_what_the_model_makes(case):
  _, _, _, model, params, stats, batch = case
  made = jax.eval_shape(lambda: model.init(jax.random.key(0), batch["image"]))
  given = {"params": params, "batch_stats": stats}
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, given)


def assert_close(actual, expected):
  """To 1e-5, of the largest value where that is above 1: float32 has no more for hidden values."""
  np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_outputs_at_evaluation(case):
  name, _, io, model, params, stats, batch = case
  (logits, out), captured = jax.jit(lambda image: model.apply(
    {"params": params, "batch_stats": stats}, image,
    capture_intermediates=lambda module, _: isinstance(module, resnet.Stage)))(batch["image"])
  np.testing.assert_allclose(logits, io["logits_eval"], atol=1e-5)
  if name == "resnet":
    assert_close(out["features"], io["pooled_eval"][..., 0, 0])
    for i in range(4):
      hidden, = captured["intermediates"][f"stage_{i}"]["__call__"]
      assert_close(hidden, published.nhwc(io[f"hidden_eval_{i + 1}"]))
  last = published.nhwc(io["hidden_eval_4" if name == "resnet" else "features_eval"])
  assert_close(out["tokens"], last.reshape(4, 4, -1))


def test_a_training_step(case):
  name, weights, io, model, params, stats, batch = case
  method = supervised.make(model)
  logits, _ = jax.jit(lambda variables, image: model.apply(
    variables, image, train=True, mutable=["batch_stats"])[0])(
      {"params": params, "batch_stats": stats}, batch["image"])
  np.testing.assert_allclose(logits, io["logits_train"], atol=1e-5)
  step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (value, (extra, _)), grads = step(params, {"batch_stats": stats}, batch, jax.random.key(0), 0)
  np.testing.assert_allclose(value, io["loss_train"], atol=1e-5)
  form = CASES[name][1]
  published.assert_gradients(form, DEPTHS, grads, published.arrays(name, "grads"))
  theirs = published.to_theirs(form, DEPTHS, {}, extra)
  buffers = published.arrays(name, "buffers")
  assert buffers
  for buffer, expected in buffers.items():
    np.testing.assert_allclose(theirs[buffer], expected, rtol=1e-5, atol=1e-5, err_msg=buffer)
    assert np.abs(expected - weights[buffer]).max() > 1e-3, buffer
