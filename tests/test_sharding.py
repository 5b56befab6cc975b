"""The same training on every mesh: losses, gradients (through the optimizer) and figures."""

import chex
import jax
import numpy as np
import pytest
from tiers import suite

from trainer import checkpoints, loop, recipe, sharding

MESHES = [dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4),
          dict(data=2, fsdp=2, tensor=2)]


VIT = {"model.heads": "4", "model.drop_path": "0.2", "model.scan": "true"}
RECIPES = {
  "vit": ("configs/vit.py:smoke", {**VIT, "optimizer.ns_steps": "none"}),
  "mae": ("configs/mae.py:smoke", {**VIT, "model.decoder_heads": "4"}),
  # A queue that a batch does not divide, and shuffled keys in 8 groups of batch statistics. With
  # seed 0 an activation lies within rounding of ReLU's kink at the third step, on some processors:
  # there a change of 1e-7 in the parameters changes the gradient by 1e-4 on one device alike.
  "moco_v1": ("configs/moco.py:smoke", {
    "data.batch_size": "64", "model.bn_groups": "8", "model.projector_hidden": "()",
    "method.queue_size": "100", "method.momentum": "0.9", "optimizer.lr": "0.01",
    "seed": "2"}),
  # Batch norm magnifies rounding from step to step, the more the faster parameters move. Without
  # solarize, whose threshold makes a whole grey level of a pixel's last bit.
  "moco_v3": ("configs/moco.py:smoke_v3", {
    **VIT, "data.batch_size": "64", "optimizer.lr": "0.01", "augment.second_view": "{}"}),
  "clip": ("configs/clip.py:smoke", {**VIT, "model.text_heads": "4"}),
  "siglip": ("configs/clip.py:smoke", {
    **VIT, "model.text_heads": "4", "method.loss": "sigmoid", "model.init_bias": "-10.0",
    "method.chunk": "8"}),
  "caption": ("configs/caption.py:smoke", {
    **VIT, "model.text_heads": "4", "model.text_depth": "2", "model.text_dropout": "0.1"}),
  "bert": ("configs/bert.py:smoke", {
    "model.heads": "4", "model.depth": "2", "model.dropout": "0.1", "model.scan": "true",
    "method.masks": "unilm"}),
  "diffusion": ("configs/diffusion.py:smoke", {"model.heads": "4", "model.scan": "true"}),
}


ALL_AXES = MESHES[-1]
IN_SUITE = [("vit", ALL_AXES)]
PAIRS = [*IN_SUITE, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [
  *((name, MESHES[0]) for name in RECIPES), *((name, ALL_AXES) for name in RECIPES),
  *(("vit", mesh) for mesh in MESHES[1:3]), ("moco_v1", MESHES[1]), ("caption", MESHES[2])]
  if pair not in IN_SUITE)]


@pytest.fixture(scope="module")
def built(request, data_dir):
  # SGD, so that a difference in the gradient shows as it is: Adam would magnify rounding.
  name, overrides = RECIPES[request.param]
  config = recipe.load_config(name, {
    "optimizer.name": "sgd", "optimizer.b2": "none", "schedule.warmup_steps": "0",
    "optimizer.lr": "0.1", "ema_decay": "0.9", "optimizer.clip_norm": "1.0", **overrides})
  return recipe.build(config, data_dir)


def train(built, start=0, stop=3, store=None, devices=None, **mesh):
  """(metrics of each step, final state) on a mesh, from a stored state if `start` is not 0."""
  mesh = sharding.make_mesh(**mesh, devices=devices)
  built = built._replace(mesh=mesh)
  abstract, shardings = loop.abstract_state(built)
  if start:
    state, _ = store.restore(abstract)
    assert int(state.step) == start
  else:
    state = jax.jit(loop.initial_state(built), out_shardings=shardings)()
  step = loop.jitted_step(built, shardings)
  history = []
  for batch in built.data.train(start, stop):
    with jax.transfer_guard("disallow"):
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
      state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return history, state


@pytest.fixture(scope="module")
def alone(built):
  history, state = train(built, devices=jax.devices()[:1])
  return history, jax.device_get(state)


@pytest.mark.parametrize("built,mesh", PAIRS, indirect=["built"], ids=str)
def test_mesh_equals_one_device(built, alone, mesh):
  history, state = train(built, **mesh)
  chex.assert_trees_all_close(history, alone[0], rtol=1e-5, atol=1e-6)  # similarities may be near 0
  chex.assert_trees_all_close(jax.device_get(state), alone[1], rtol=1e-5, atol=3e-6)
  assert history[0]["grad_norm"] > 0.01 and history[-1]["loss"] != history[0]["loss"]


@pytest.mark.parametrize("built", suite(["vit", "moco_v1", "clip", "diffusion"], 0), indirect=True)
def test_a_run_saved_on_one_mesh_goes_on_on_others(built, tmp_path):
  """fsdp 4 x tensor 2 writes; 2 and 8 devices, data parallel, read and train six steps more."""
  unbroken, _ = train(built, stop=9, devices=jax.devices()[:1])
  history, state = train(built, data=1, fsdp=4, tensor=2)
  store = checkpoints.Checkpoints(tmp_path)
  store.save(state, 3)
  store.finish()
  losses = [float(m["loss"]) for m in unbroken]
  np.testing.assert_allclose([float(m["loss"]) for m in history], losses[:3], rtol=1e-5)
  for count in (2, 8):
    more, _ = train(built, 3, 9, store, devices=jax.devices()[:count])
    np.testing.assert_allclose([float(m["loss"]) for m in more], losses[3:], rtol=1e-5)
  store.close()


@pytest.mark.parametrize("built", RECIPES, indirect=True)
def test_fsdp_splits_all_that_can_be_split(built):
  state, _ = loop.abstract_state(built._replace(mesh=sharding.make_mesh(data=1, fsdp=8)))
  for path, leaf in jax.tree.leaves_with_path((state.params, state.ema)):
    free = leaf.shape[1:] if "blocks" in str(path) else leaf.shape
    splits = any(side % 8 == 0 for side in free)
    assert ("fsdp" in str(leaf.sharding.spec)) == splits, path


def test_errors():
  with pytest.raises(ValueError, match="must multiply to the 8 devices"):
    sharding.make_mesh(data=3)
  with pytest.raises(ValueError, match="one of them may be -1"):
    sharding.make_mesh(data=-1, fsdp=-1)
  mesh = sharding.make_mesh(data=2, tensor=4)
  with pytest.raises(ValueError, match="mesh.tensor = 4 does not divide axis -2 of x/blocks/at"):
    sharding.leaf_spec("x/blocks/attention/qkv_kernel", (2, 8, 3, 6, 4), mesh)
  with pytest.raises(ValueError, match="data.batch_size = 6 is not a multiple of 4"):
    sharding.check_batch(6, 2, mesh)


def test_rows_of_processes_make_the_batch():
  mesh = sharding.make_mesh(data=4, tensor=2)
  np.testing.assert_array_equal(sharding.local_rows(8, mesh), np.arange(8))
  batch = {"x": np.arange(16).reshape(8, 2)}
  chex.assert_trees_all_equal(jax.device_get(sharding.to_device(batch, 8, mesh)), batch)
