"""MoCo's order of operations, its queue, its errors and its warning, beside plain NumPy."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losses import contrastive
from methods import moco as method_module
from models import moco
from trainer import loop, optimizer, recipe, sharding

SMALL = dict(backbone="vit", image_size=16, channels=1, patch=8, width=16, depth=1, heads=2,
             mlp_dim=32, pool="mean", positions="sincos2d", dim=8)
METHOD = dict(batch_size=6, total_steps=10, queue_size=10, momentum=0.9, temperature=0.2)


def batch_of(seed, size=6):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {"image": jax.random.normal(keys[0], (size, 16, 16, 1)),
          "image_2": jax.random.normal(keys[1], (size, 16, 16, 1))}


def encode(model, params, image):
  y = np.asarray(model.apply({"params": params}, image), np.float64)
  return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_losses_against_numpy():
  rng = np.random.default_rng(0)
  def unit(*shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  q, k, queue, tau = unit(5, 4), unit(5, 4), unit(7, 4), 0.3
  expected, logits = [], []
  for i in range(5):
    row = np.array([q[i] @ k[i], *(q[i] @ other for other in queue)]) / tau
    logits.append(row)
    expected.append(np.log(np.exp(row - row[0]).sum()))
  ours = contrastive.queue_logits(*map(jnp.float32, (q, k, queue)), tau)
  np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(contrastive.info_nce(ours, jnp.zeros(5, int)), expected, rtol=1e-5)
  np.testing.assert_allclose(contrastive.batch_logits(jnp.float32(q), jnp.float32(k), tau),
                             q @ k.T / tau, rtol=1e-5, atol=1e-6)
  grads = jax.grad(lambda *x: contrastive.queue_logits(*x, tau).sum(), (0, 1, 2))(
    *map(jnp.float32, (q, k, queue)))
  assert np.abs(grads[0]).max() > 0 and not np.any(grads[1]) and not np.any(grads[2])
  np.testing.assert_allclose(contrastive.normalize(jnp.float32(3 * q)), q, atol=1e-6)
  assert np.all(np.isfinite(jax.grad(lambda x: contrastive.normalize(x).sum())(jnp.zeros((2, 3)))))


def test_queue_is_first_in_first_out_and_logits_see_it_as_it_was():
  """A batch of 6 in a queue of 10 wraps around; written again in NumPy, key by key."""
  model = moco.make(**SMALL)
  method = method_module.make(model, **METHOD)
  params, extra = method.init(jax.random.key(0), batch_of(0))
  theta_k = jax.tree.map(np.asarray, params)
  queue, pointer = np.array(extra["queue"]), 0
  np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-6)
  loss = jax.jit(method.loss)
  for step in range(4):
    params = jax.tree.map(lambda x: x + 0.01, params)  # as if trained
    batch = batch_of(step + 1)
    value, (extra, metrics) = loss(params, extra, batch, jax.random.key(step), step)
    theta_k = jax.tree.map(lambda k, q: 0.9 * k + 0.1 * np.asarray(q), theta_k, params)
    q, k = encode(model, params, batch["image"]), encode(model, theta_k, batch["image_2"])
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], 1) / 0.2
    nce = np.log(np.exp(logits).sum(1)) - logits[:, 0]
    np.testing.assert_allclose(value, nce.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["top1"], (logits.argmax(1) == 0).mean())
    np.testing.assert_allclose(metrics["positive"], (q * k).sum(1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["negative"], (q @ queue.T).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["feature_std"], q.std(0).mean() * 8**0.5, rtol=1e-4)
    for key in k:
      queue[pointer], pointer = key, (pointer + 1) % 10
    np.testing.assert_allclose(extra["queue"], queue, atol=1e-5)
    assert extra["pointer"] == pointer
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 extra["momentum_params"], theta_k)
  assert 0 < metrics["queue_age"] < 2  # 10 keys are the last batch and most of the one before


def test_v3_is_symmetric_and_its_momentum_rises_to_one():
  model = moco.make(**SMALL, predictor_hidden=(12,))
  method = method_module.make(model, **{**METHOD, "queue_size": 0}, momentum_schedule="cosine")
  batch = batch_of(0)
  params, extra = method.init(jax.random.key(0), batch)
  assert "predictor" in params and "predictor" not in extra["momentum_params"]
  assert not {"queue", "pointer"} & set(extra)
  moved = jax.tree.map(lambda x: x + 0.02, params)
  swapped = {"image": batch["image_2"], "image_2": batch["image"]}
  values = [method.loss(moved, extra, b, jax.random.key(0), 3)[0] for b in (batch, swapped)]
  np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
  for step in (0, 5, 10):
    m = 1 - 0.1 * (1 + np.cos(np.pi * step / 10)) / 2
    after = method.loss(moved, extra, batch, jax.random.key(0), step)[1][0]["momentum_params"]
    kernel = extra["momentum_params"]["projector"]["dense_0"]["kernel"]
    np.testing.assert_allclose(after["projector"]["dense_0"]["kernel"],
                               m * kernel + (1 - m) * (kernel + 0.02), atol=1e-7)


def test_momentum_moves_once_a_step_however_many_parts_a_batch_has():
  method = method_module.make(moco.make(**SMALL), **METHOD)
  params, extra = method.init(jax.random.key(0), batch_of(0))
  moved = jax.tree.map(lambda x: x + 1, params)
  once = method.loss(moved, extra, batch_of(1), jax.random.key(0), 0)[1][0]
  twice = method.loss(moved, once, batch_of(2), jax.random.key(0), 0)[1][0]
  later = method.loss(moved, twice, batch_of(2), jax.random.key(0), 1)[1][0]
  def kernel(extra):
    return extra["momentum_params"]["projector"]["dense_0"]["kernel"]
  np.testing.assert_array_equal(kernel(once), kernel(twice))
  assert np.abs(kernel(later) - kernel(twice)).min() > 0.05


def test_shuffling_moves_keys_to_other_groups_and_back():
  """The draw decides who is normalised with whom, and nothing else."""
  model = moco.make(**SMALL, head_norm=True, projector_hidden=(8,), bn_groups=2)
  method = method_module.make(model, **METHOD)
  batch = batch_of(0)
  params, extra = method.init(jax.random.key(0), batch)
  assert set(method.draw(jax.random.key(1), batch)) == {"image", "image_2", "shuffle"}

  def keys(shuffle):
    shuffled = {**batch, "shuffle": jnp.float32(shuffle)}
    return np.asarray(method.loss(params, extra, shuffled, jax.random.key(0), 0)[1][0]["queue"][:6])

  stay = keys([0, 1, 2, 3, 4, 5])
  np.testing.assert_allclose(keys([2, 1, 0, 5, 3, 4]), stay, atol=1e-6)  # within both groups
  np.testing.assert_allclose(keys([3, 4, 5, 0, 1, 2]), stay, atol=1e-6)  # groups change places
  assert np.abs(keys([0, 3, 2, 1, 4, 5]) - stay).max() > 1e-3  # one of each changes groups


@pytest.mark.parametrize("overrides, message", [
  ({"method.queue_size": "8"}, "method.queue_size = 8: expected 0 or at least the batch size, 16"),
  ({"method.momentum": "1.0"}, r"method.momentum = 1.0: expected a number in \[0, 1\)"),
  ({"method.momentum": "-0.1"}, r"method.momentum = -0.1: expected a number in \[0, 1\)"),
  ({"method.temperature": "0.0"}, "method.temperature = 0.0: expected a number above 0"),
  ({"model.bn_groups": "3"}, "model.bn_groups = 3: does not divide the 16 examples"),
  ({"model.bn_groups": "0"}, "model.bn_groups = 0: expected at least 1"),
  ({"model.backbone": "resnte"}, "config.model.backbone = 'resnte': did you mean 'resnet'"),
  ({"model.patch": "4"}, "model.patch: a resnet has no such field"),
  ({"model.dim": "0"}, r"model.dim = \(0,\): expected whole numbers"),
  ({"method.momentum_schedule": "cosin"}, "did you mean 'cosine'"),
  ({"optimizer.frozen": "embedd"}, "optimizer.frozen = 'embedd': must match some parameters"),
])
def test_bad_input_is_named_before_anything_compiles(overrides, message, data_dir):
  with pytest.raises(ValueError, match=message):
    config = recipe.load_config("configs/moco.py:smoke", overrides)
    loop.abstract_state(recipe.build(config, data_dir))


def test_collapse_is_said_once(tmp_path, data_dir, caplog):
  config = recipe.load_config("configs/moco.py:smoke", {
    "method.collapse_threshold": "1e9", "log_every_steps": "1", "evals.knn": "none"})
  with caplog.at_level(logging.WARNING, "vitrine"):
    loop.train(recipe.build(config, data_dir), tmp_path / "run")
  warnings = [r.getMessage() for r in caplog.records if "collapse_threshold" in r.getMessage()]
  assert len(warnings) == 1 and "step 1: feature_std" in warnings[0]


@pytest.mark.slow
def test_frozen_parameters_stay_and_cost_no_optimizer_state(data_dir):
  config = recipe.load_config("configs/moco.py:smoke_v3", {"optimizer.weight_decay": "0.5"})
  built = recipe.build(config, data_dir)
  _, shardings = loop.abstract_state(built)
  state = jax.jit(loop.initial_state(built), out_shardings=shardings)()
  before = jax.device_get(state)
  paths = {optimizer.path_name(path) for path, _ in jax.tree.leaves_with_path(before.opt)}
  assert any("backbone/cls" in path for path in paths)
  assert not any("embed/projection" in path for path in paths)
  step = loop.jitted_step(built, shardings)
  for batch in built.data.train(0, 2):
    state, metrics = step(state, batch)
  np.testing.assert_array_equal(before.params["backbone"]["embed"]["projection"]["kernel"],
                                state.params["backbone"]["embed"]["projection"]["kernel"])
  assert np.abs(before.params["projector"]["dense_0"]["kernel"]
                - state.params["projector"]["dense_0"]["kernel"]).max() > 1e-5


def test_the_queue_is_given_to_the_step_and_taken_back(data_dir):
  config = recipe.load_config("configs/moco.py:smoke")
  built = recipe.build(config, data_dir)
  _, shardings = loop.abstract_state(built)
  state = jax.jit(loop.initial_state(built), out_shardings=shardings)()
  batch = jax.device_put(next(iter(built.data.train(0, 1))), sharding.batch_sharding(built.mesh))
  step = loop.jitted_step(built, shardings)
  with jax.transfer_guard("disallow"):
    after, _ = step(state, batch)
  assert state.extra["queue"].is_deleted()  # donated: its memory is the new queue's
  assert after.extra["pointer"] == 16
