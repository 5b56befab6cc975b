"""MoCo v1, v2 and v3 against recordings of the original repositories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
from tiers import suite

from losses import contrastive
from methods import moco as method_module
from models import moco
from trainer import optimizer

# case -> hidden layers of the projector, queue, temperature, batch, groups, tolerance by step.
# Four examples a batch norm and a rate of 0.1 magnify rounding: run in float64, this code is as far
# from the float32 recordings as in float32 (v1's loss by 1.2e-5, 1.1e-4 and 1.8e-4 in its steps).
# v1's losses are as far apart as rounding makes them: half a bit of the initial parameters, at
# random, moves the second by up to 2.0e-4 and the third by 5.5e-4 (six draws).
CASES = {
  "moco_v1": ((), 8, 0.07, 4, 1, (2e-5, 3e-4, 8e-4)),
  "moco_v2": ((16,), 8, 0.2, 4, 1, (1e-5, 2e-5, 2e-5)),
  "moco_v2_2rank": ((16,), 16, 0.2, 8, 2, (1e-5, 3e-5)),
}


def close(actual, expected, atol=1e-5, name=""):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", suite(CASES, 0))
def test_steps_with_a_queue(case):
  """Loss, logits, gradients, queue, momentum encoder and statistics over all recorded steps."""
  hidden, size, temperature, batch_size, groups, tolerances = CASES[case]
  weights, io = published.load(case), published.arrays(case)
  fields = dict(backbone="resnet", depths=(1, 1, 1, 1), projector_hidden=hidden)
  model = moco.make(variant="18", widths=(8, 8, 12, 16), stem_width=64, image_size=32, channels=3,
                    dim=12, bn_groups=groups, **fields)
  method = method_module.make(model, batch_size=batch_size, total_steps=len(tolerances),
                              queue_size=size, momentum=0.9, temperature=temperature)
  params, carried = published.to_ours("moco/original", weights, fields)
  made, extra = jax.jit(method.init)(jax.random.key(0), {
    "image": jnp.zeros((groups, 32, 32, 3))})
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
  assert set(carried) == {"stats", "momentum_params", "momentum_stats", "queue"}
  extra = {**extra, **carried}
  tx, _ = optimizer.make(schedule=lambda step: 1.0, batch_size=batch_size, name="sgd", lr=0.1,
                         momentum=0.9, weight_decay=1e-4, decay="")
  opt = tx.init(params)
  step_fn, update = jax.jit(jax.value_and_grad(method.loss, has_aux=True)), jax.jit(tx.update)
  encode = jax.jit(lambda variables, image: contrastive.normalize(
    model.apply(variables, image, train=True, mutable=["batch_stats"])[0]))
  for step, atol in enumerate(tolerances):
    batch = {"image": published.nhwc(io[f"im_q_{step}"]),
             "image_2": published.nhwc(io[f"im_k_{step}"])}
    if groups > 1:
      batch["shuffle"] = np.argsort(io["shuffle"][step]).astype(np.float32)
    queue, pointer = np.asarray(extra["queue"]), int(extra["pointer"])
    query = encode({"params": params, **extra["stats"]}, batch["image"])
    (value, (extra, metrics)), grads = step_fn(params, extra, batch, jax.random.key(0), step)
    key = extra["queue"][(pointer + np.arange(batch_size)) % size]
    close(contrastive.queue_logits(query, key, queue, 1.0), io[f"logits_{step}"] * temperature,
          atol)
    close(value, io[f"loss_{step}"].mean(), atol)
    atol = min(atol, tolerances[1])  # keys and gradients are not moved that far
    close(extra["queue"].T, io[f"queue_{step}"], atol)
    assert extra["pointer"] == io[f"queue_ptr_{step}"]
    if step == 0:
      published.assert_gradients("moco/original", fields, grads, published.arrays(case, "grads"))
    if f"gradnorm_{step}" in io:
      theirs = published.to_theirs("moco/original", fields, grads)
      norms = [np.linalg.norm(g) for g in theirs.values()]
      close(np.sort(norms), np.sort(io[f"gradnorm_{step}"]), 10 * atol * max(norms))
    updates, opt = update(grads, opt, params)
    params = optax.apply_updates(params, updates)
  theirs = published.to_theirs("moco/original", fields, params, extra)
  after = published.arrays(case, "after")
  for encoder in ("encoder_q.", "encoder_k."):
    assert sum(name.startswith(encoder) for name in after) > 50
  for name in theirs:
    if name.startswith("encoder_"):
      close(published.thinned(theirs[name].ravel()), after[name], 10 * tolerances[1], name)


@pytest.mark.parametrize("case, arrays", [("moco_v3_loss", "io"), ("moco_v2_2rank", "v3")])
def test_v3_loss_and_its_gradients(case, arrays):
  io = published.arrays(case, arrays)

  def loss(q1, q2):
    q1, q2, k1, k2 = map(contrastive.normalize, (q1, q2, io["k1"], io["k2"]))
    label = jnp.arange(len(q1))
    return 2 * io["T"] * (
      contrastive.info_nce(contrastive.batch_logits(q1, k2, io["T"]), label)
      + contrastive.info_nce(contrastive.batch_logits(q2, k1, io["T"]), label)).mean()

  value, grads = jax.value_and_grad(loss, (0, 1))(io["q1"], io["q2"])
  close(value, io["loss"].mean())
  ranks = io["loss"].size  # each recorded the gradient of its own rows' mean
  close(np.asarray(grads) * ranks, [io["grad_q1"], io["grad_q2"]], atol=1e-6)


def test_a_step_of_v3_with_a_vit():
  weights, io = published.load("moco_v3_vit"), published.arrays("moco_v3_vit")
  fields = dict(backbone="vit", channels=3, patch=8, heads=4, projector_hidden=(40, 40),
                predictor_hidden=(40,))
  model = moco.make(image_size=32, width=48, depth=2, mlp_dim=192, dim=16, head_norm=True, **fields)
  method = method_module.make(model, batch_size=8, total_steps=1, queue_size=0, momentum=0.99,
                              temperature=0.2)
  params, carried = published.to_ours("moco/v3", weights, fields)
  batch = {"image": published.nhwc(io["x1"]), "image_2": published.nhwc(io["x2"])}
  made, extra = method.init(jax.random.key(0), batch)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
  assert set(carried) == {"stats", "momentum_params", "momentum_stats"}
  extra = {**extra, **carried}
  frozen = "backbone/(embed/projection|.*position)"  # the recording has noise on fixed positions

  def loss(params, *rest):
    return method.loss(optimizer.stop_frozen({"frozen": frozen})(params), *rest)

  (value, (extra, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, extra, batch, jax.random.key(0), 0)
  close(value, io["loss"])
  published.assert_gradients("moco/v3", fields, grads, published.arrays("moco_v3_vit", "grads"),
                             cancelled=("base_encoder.norm.bias",))  # by the next batch norm
  assert not any(np.any(g) for g in jax.tree.leaves(grads["backbone"]["embed"]))
  after = published.arrays("moco_v3_vit", "after")
  theirs = published.to_theirs("moco/v3", fields, params, extra)
  assert set(theirs) == {name for name in weights if not name.endswith("num_batches_tracked")}
  for name, x in theirs.items():
    close(published.thinned(x.ravel()), after[name], name=name)

  variables = {"params": params, **extra["stats"]}
  projection, out = model.apply(variables, batch["image"], method="encode")
  close(out["tokens"], io["feat_eval"][:, 1:])
  close(out["features"], io["feat_eval"][:, 0])
  close(projection, io["proj_eval"])
  close(model.apply(variables, batch["image"]), io["pred_eval"])
