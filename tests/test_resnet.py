"""ResNet and batch norm against float64 NumPy, published counts and what must not depend on what.

Recordings of the published implementations are in test_reference_resnet.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from tiers import suite

from input_pipeline import records
from methods import supervised
from models import resnet, vit
from models.batch_norm import BatchNorm
from trainer import fields as section
from trainer import recipe, sharding

TINY = dict(variant="18", image_size=16, channels=3, num_classes=5, depths=(1, 2), widths=(4, 6))


def random_variables(model, *args, **kwargs):
  """Every parameter and statistic random, so that no initial zero or one hides a mistake."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
  return jax.tree.map_with_path(
    lambda path, s: (rng.uniform(0.5, 2, s.shape) if path[-1].key == "var" else
                     rng.normal(0, 0.4, s.shape)).astype(np.float32), shapes)


# --- Batch norm in float64 NumPy: one group and one channel at a time -----------------------------

def np_batch_norm(x, groups, scale, bias, eps=1e-5):
  """(y, mean and unbiased variance [c] of the first group)."""
  x, size = x.astype(np.float64), len(x) // groups
  y, first = np.empty_like(x), []
  for c in range(x.shape[-1]):
    for g in range(groups):
      values = x[g * size:(g + 1) * size, ..., c]
      y[g * size:(g + 1) * size, ..., c] = (
        (values - values.mean()) / np.sqrt(values.var() + eps) * scale[c] + bias[c])
    first.append((x[:size, ..., c].mean(), x[:size, ..., c].var(ddof=1)))
  return y, *np.transpose(first)


def apply(module, variables, x):
  return module.apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 2, 5)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_in_training(groups, shape):
  x = 300 + normal(*shape) * np.arange(1, shape[-1] + 1, dtype=np.float32)  # sees E[x^2] - E[x]^2
  module = BatchNorm(groups, momentum=0.7, epsilon=1e-5)
  variables = {
    "params": {"scale": normal(shape[-1], seed=2), "bias": normal(shape[-1], seed=3)},
    "batch_stats": {"mean": normal(shape[-1], seed=4), "var": normal(shape[-1], seed=5) ** 2}}
  y, updated = apply(module, variables, x)
  expected, mean, var = np_batch_norm(x, groups, **variables["params"])
  np.testing.assert_allclose(y, expected, atol=2e-4)
  old = variables["batch_stats"]
  chex.assert_trees_all_close(updated["batch_stats"], {
    "mean": 0.7 * old["mean"] + 0.3 * mean, "var": 0.7 * old["var"] + 0.3 * var}, rtol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_at_evaluation(affine):
  x, module = 5 + normal(4, 3, 2), BatchNorm(groups=3, epsilon=0.1, affine=affine)
  variables = random_variables(module, x, train=False)
  assert ("params" in variables) == affine
  stats = variables["batch_stats"]
  expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 0.1)
  if affine:
    expected = expected * variables["params"]["scale"] + variables["params"]["bias"]
  np.testing.assert_allclose(module.apply(variables, x, train=False), expected, atol=1e-5)


def test_batch_norm_gradient_is_the_difference_quotient():
  x, weight, scale, bias = normal(6, 3), normal(6, 3, seed=2), normal(3, seed=3), normal(3, seed=4)
  stats = {"mean": np.zeros(3), "var": np.ones(3)}

  def loss(x, scale, bias):
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    return jnp.sum(apply(BatchNorm(groups=2), variables, x)[0] * weight)

  values = [np.float64(a) for a in (x, scale, bias)]
  for i, gradient in enumerate(jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)):
    for place in np.ndindex(values[i].shape):
      ends = []
      for step in (-1e-5, 1e-5):
        moved = [a.copy() for a in values]
        moved[i][place] += step
        ends.append(np.sum(np_batch_norm(moved[0], 2, *moved[1:])[0] * weight))
      np.testing.assert_allclose(gradient[place], (ends[1] - ends[0]) / 2e-5, atol=1e-4)


def test_batch_norm_in_bfloat16_has_float32_statistics():
  x = (50 + normal(64, 7, 3)).astype(jnp.bfloat16)
  variables = {"params": {"scale": np.ones(3), "bias": np.zeros(3)},
               "batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
  y, updated = apply(BatchNorm(dtype=jnp.bfloat16, momentum=0.0), variables, x)
  expected, mean, var = np_batch_norm(np.float64(x), 1, np.ones(3), np.zeros(3))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8)  # one rounding
  chex.assert_trees_all_close(updated["batch_stats"], {"mean": mean, "var": var}, rtol=1e-5)


@pytest.mark.parametrize("groups,shape", [(3, (8, 4)), (8, (8, 4)), (1, (1, 4))])
def test_batch_norm_refuses_unequal_or_single_values(groups, shape):
  with pytest.raises(ValueError, match=rf"model.bn_groups = {groups}: does not split a batch"):
    jax.eval_shape(lambda: BatchNorm(groups).init(jax.random.key(0), jnp.ones(shape), train=True))


@pytest.mark.parametrize("groups,talks", [(1, True), (8, False), (16, False)])
def test_groups_that_devices_hold_whole_need_no_communication(groups, talks):
  mesh = sharding.make_mesh(data=4, fsdp=2)
  rows, module = sharding.batch_sharding(mesh), BatchNorm(groups)
  variables = {"params": {"scale": np.ones(3), "bias": np.zeros(3)},
               "batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(apply(module, variables, x)[0] ** 3)),
                     in_shardings=rows, out_shardings=rows)
  program = gradient.lower(normal(32, 2, 2, 3)).compile().as_text()
  assert any(word in program for word in ("all-reduce", "all-gather", "collective-")) == talks


# --- The network ----------------------------------------------------------------------------------

def np_conv(x, kernel, stride):
  """One image [h, w, c], zeros around it, one output pixel at a time."""
  size = kernel.shape[0]
  x = np.pad(np.float64(x), [(size // 2,) * 2] * 2 + [(0, 0)])
  rows, columns = ((side - size) // stride + 1 for side in x.shape[:2])
  return np.array([[np.einsum("hwc,hwcd->d", x[r:r + size, c:c + size], kernel)
                    for c in range(0, columns * stride, stride)]
                   for r in range(0, rows * stride, stride)])


def np_norm(x, p, stats):
  return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["scale"] + p["bias"]


def np_resnet(image, p, stats, stem):
  """A net of basic blocks at evaluation, on one image: (logits, the last grid)."""
  x = np_conv(image, p["stem"]["kernel"], 2 if stem == "imagenet" else 1)
  x = np.maximum(np_norm(x, p["stem_norm"], stats["stem_norm"]), 0)
  if stem == "imagenet":
    h, w, c = x.shape
    x = np.pad(x, [(1, 1), (1, 1), (0, 0)])  # zeros never exceed what ReLU left
    x = np.array([[x[i:i + 3, j:j + 3].max((0, 1)) for j in range(0, w, 2)]
                  for i in range(0, h, 2)])
  for stage in ("stage_0", "stage_1"):
    for name in sorted(p[stage]):
      block, s = p[stage][name], stats[stage][name]
      stride = 2 if (stage, name) == ("stage_1", "block_0") else 1
      y = np.maximum(np_norm(np_conv(x, block["conv_0"]["kernel"], stride), block["norm_0"],
                             s["norm_0"]), 0)
      y = np_norm(np_conv(y, block["conv_1"]["kernel"], 1), block["norm_1"], s["norm_1"])
      if "shortcut" in block:
        x = np_norm(np_conv(x, block["shortcut"]["kernel"], stride), block["shortcut_norm"],
                    s["shortcut_norm"])
      x = np.maximum(x + y, 0)
  return x.mean((0, 1)) @ p["head"]["kernel"] + p["head"]["bias"], x


@pytest.mark.parametrize("stem,size", [("small", (7, 10)), ("imagenet", (21, 26))])
def test_basic_blocks(stem, size):
  model, image = resnet.make(**TINY, stem=stem), normal(2, *size, 3)
  variables = random_variables(model, image)
  assert "shortcut" not in variables["params"]["stage_0"]["block_0"]
  assert "shortcut" not in variables["params"]["stage_1"]["block_1"]
  logits, out = jax.jit(model.apply)(variables, image)
  for i in range(2):
    expected, last = np_resnet(image[i], variables["params"], variables["batch_stats"], stem)
    scale = np.abs(last).max()
    np.testing.assert_allclose(logits[i], expected, atol=1e-5 * scale)
    np.testing.assert_allclose(out["tokens"][i], last.reshape(-1, 6), atol=1e-5 * scale)
    np.testing.assert_allclose(out["features"][i], last.mean((0, 1)), atol=1e-5 * scale)
  assert out["weights"] is None
  variables["params"].pop("head")
  features, _ = jax.jit(model.clone(num_classes=0).apply)(variables, image)
  np.testing.assert_array_equal(features, out["features"])
  with pytest.raises(ValueError, match="attention: a ResNet has none"):
    model.apply(variables, image, return_weights=True)


@pytest.mark.parametrize("variant,count", [  # as torchvision's, with 1000 classes
  ("18", 11_689_512), ("34", 21_797_672), (50, 25_557_032), ("101", 44_549_160),
  ("152", 60_192_808)])
def test_published_parameter_counts(variant, count):
  model = resnet.make(variant=variant, image_size=224, channels=3, num_classes=1000)
  made = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
  assert sum(x.size for x in jax.tree.leaves(made["params"])) == count


@pytest.mark.parametrize("zero_init", [False, True])
def test_initial_values(zero_init):
  model = resnet.make(variant="50", image_size=8, channels=3, num_classes=5, depths=(1, 2),
                      widths=(32, 64), stem="small", zero_init=zero_init)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  assert not np.any(params["head"]["kernel"])
  for path, x in jax.tree.leaves_with_path(params):
    parent, leaf = path[-2].key, path[-1].key
    if leaf == "scale":
      np.testing.assert_array_equal(x, 0.0 if parent == "norm_2" and zero_init else 1.0)
    elif leaf == "kernel" and x.ndim == 4:
      out = x.shape[0] * x.shape[1] * x.shape[3]
      np.testing.assert_allclose(np.std(x), np.sqrt(2 / out), rtol=5 / np.sqrt(x.size))


@pytest.mark.parametrize("fields,message", [
  (dict(variant="51"), "model.variant = '51': expected one of 18, 34, 50"),
  (dict(depths=(1, 0)), r"model.depths = \(1, 0\): expected whole numbers above 0"),
  (dict(widths=64), "model.widths = 64: expected whole numbers"),
  (dict(depths=(1, 2, 3)), "expected one of each a stage"),
  (dict(stem_width=0), "model.stem_width = 0: expected at least 1"),
  (dict(bn_groups=0), "model.bn_groups = 0: expected at least 1"),
  (dict(bn_momentum=1.0), r"model.bn_momentum = 1.0: expected a number in \[0, 1\)"),
  (dict(stem="big"), "config.model.stem = 'big'"),
  (dict(variant=5.0), "config.model.variant = 5.0: expected str or int"),
])
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    section.call(resnet.make, fields, "model", image_size=32, channels=3)


# --- Supervised learning with it ------------------------------------------------------------------

@pytest.mark.parametrize("groups", suite([1, 8], 0))
def test_eight_devices_compute_what_one_does(groups):
  method = supervised.make(resnet.make(**TINY, bn_groups=groups))
  batch = {"image": normal(16, 16, 16, 3), "label": np.arange(16) % 5}
  params = random_variables(resnet.make(**TINY), batch["image"])
  params, extra = params["params"], {"batch_stats": params["batch_stats"]}
  step = jax.value_and_grad(method.loss, has_aux=True)
  alone = jax.jit(step)(params, extra, batch, jax.random.key(0), 0)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    spread = jax.jit(step, in_shardings=(
      *sharding.shard_state((params, extra), mesh), sharding.batch_sharding(mesh), None, None))(
      params, extra, batch, jax.random.key(0), 0)
  chex.assert_trees_all_close(spread, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [
  resnet.make(**TINY),
  vit.make(image_size=16, channels=3, num_classes=5, patch=8, width=8, depth=1, heads=2,
           mlp_dim=8)], ids=["resnet", "vit"])
def test_extra_is_what_the_model_has_beside_parameters(model):
  method = supervised.make(model)
  batch = {"image": normal(4, 16, 16, 3), "label": np.arange(4)}
  key = jax.random.key(0)
  params, extra = jax.eval_shape(method.init, key, batch)
  _, (after, _) = jax.eval_shape(method.loss, params, extra, batch, key, 0)
  assert set(extra) == ({"batch_stats"} if isinstance(model, resnet.ResNet) else set())
  assert extra == after


def test_groups_that_do_not_divide_a_batch_are_refused_before_compiling():
  config = recipe.load_config("configs/resnet.py:smoke", {"model.bn_groups": "8",
                                                          "accumulate": "4"})
  info = records.Info((16, 16, 1), 10, (), {"train": 100}, "")
  with pytest.raises(ValueError, match="model.bn_groups = 8: does not divide the 4 examples"):
    recipe.make_method(recipe.fill_from_data(config, info, 100))


def test_predictions_use_the_running_statistics():
  method = supervised.make(resnet.make(**TINY))
  batch = {"image": normal(2, 16, 16, 3)}
  extra = random_variables(resnet.make(**TINY), batch["image"])
  params = extra.pop("params")
  for name in ("logits", "features", "tokens"):
    predict = jax.jit(lambda extra, name=name: method.predict[name](params, extra, batch, None))
    given, moved = predict(extra), predict(jax.tree.map(lambda x: x + 0.1, extra))
    assert np.abs(given - moved).max() > 0.01
