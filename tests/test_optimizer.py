"""Schedules, optimizers and the training step against float64 NumPy and closed forms."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from methods import mae as mae_method
from methods.method import Method
from models import mae, vit
from trainer import optimizer, schedule
from trainer.optimizers import adamw
from trainer.program import count_flops
from trainer.state import TrainState, make_step, statistics, with_statistics

TINY = dict(image_size=8, channels=3, patch=4, width=8, depth=2, heads=2, mlp_dim=12)


def normal(*shape, seed=0, scale=1.0):
  return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def filled(shapes, seed):
  """A nested dict of random arrays from {"a/b": shape}."""
  return unflatten_dict({name: normal(*shape, seed=(seed, i)) for i, (name, shape) in
                         enumerate(sorted(shapes.items()))}, sep="/")


def one_step(tx, params, grads):
  return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


# --- Schedules ------------------------------------------------------------------------------------

NP_DECAYS = {  # share of the way, steps so far -> multiplier, for end = 0.1 and timescale = 30
  "cosine": lambda share, t: 0.1 + 0.9 * np.cos(np.pi * share / 2)**2,
  "linear": lambda share, t: 1 - 0.9 * share,
  "constant": lambda share, t: 1.0,
  "rsqrt": lambda share, t: np.sqrt(30 / (30 + t)),
  "multistep": lambda share, t: 0.1 ** sum(share >= at for at in (0.5, 0.75)),
}


@pytest.mark.parametrize("name", schedule.DECAYS)
@pytest.mark.parametrize("warmup,cooldown", [(10, 20), (10, 0), (0, 20), (0, 0)])
def test_schedule(name, warmup, cooldown):
  middle = 100 - warmup - cooldown

  def expected(step):
    if step < warmup:
      return step / warmup
    if step > 100 - cooldown:
      return NP_DECAYS[name](1, middle) * (100 - step) / cooldown
    return NP_DECAYS[name]((step - warmup) / middle, step - warmup)

  steps = np.array([0, 1, 9, 10, 11, 45, 79, 80, 81, 90, 99, 100])
  rate = schedule.make(total_steps=100, name=name, warmup_steps=warmup, cooldown_steps=cooldown,
                       end=0.1, timescale=30, drops=(0.5, 0.75))
  np.testing.assert_allclose(jax.jit(rate)(jnp.asarray(steps)), [expected(s) for s in steps],
                             rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedule_from_another_rate_held_late_and_from_the_start(name):
  """timm's CosineLRScheduler of 100 epochs, stepped at the end of each, as DeiT's is."""
  rate = schedule.make(total_steps=1000, name=name, warmup_steps=50, warmup_from=0.02, end=0.1,
                       from_start=True, hold_steps=10, delay_steps=10)

  def expected(epoch):
    return 0.02 + 0.98 * epoch / 5 if epoch < 5 else NP_DECAYS[name](epoch / 100, epoch)

  steps = np.array([0, 9, 10, 19, 20, 59, 60, 77, 500, 999])
  np.testing.assert_allclose(jax.jit(rate)(jnp.asarray(steps)),
                             [expected(max(s // 10 - 1, 0)) for s in steps], rtol=3e-6)


@pytest.mark.parametrize("fields,message", [
  (dict(warmup_from=1.5), r"schedule.warmup_from = 1.5"), (dict(end=-1.0), "schedule.end = -1.0"),
  (dict(hold_steps=0), "schedule.hold_steps = 0"), (dict(delay_steps=-1), "delay_steps = -1")])
def test_schedules_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    schedule.make(total_steps=10, **fields)


def test_schedule_longer_than_the_run():
  with pytest.raises(ValueError, match=r"\(7 steps\).*\(4\).*\(10\)"):
    schedule.make(total_steps=10, warmup_steps=7, cooldown_steps=4)


# --- Optimizers: one tensor of one layer at a time; s is the tensor's state, t counts from 1 ------

def average(s, name, decay, x):
  s[name] = decay * s.get(name, 0) + (1 - decay) * x
  return s[name]


def np_adamw(p, g, s, t, lr, wd, b1=0.9, b2=0.999, eps=1e-8, trust=lambda p, u: 1, debias=True):
  m, v = average(s, "m", b1, g), average(s, "v", b2, g**2)
  m, v = (m / (1 - b1**t), v / (1 - b2**t)) if debias else (m, v)
  u = m / (np.sqrt(v) + eps) + wd * p
  return p - lr * trust(p, u) * u


def np_lamb(p, g, s, t, lr, wd, eps=1e-6, always_adapt=False, **options):
  """Apex's FusedLAMB: csrc/multi_tensor_lamb.cu, use_nvlamb off."""
  def trust(p, u):
    norms = np.linalg.norm(p), np.linalg.norm(u)
    return norms[0] / norms[1] if (wd or always_adapt) and min(norms) > 0 else 1
  return np_adamw(p, g, s, t, lr, wd, eps=eps, **options, trust=trust)


def np_sgd(p, g, s, t, lr, wd, momentum=0.9, nesterov=False):
  g = g + wd * p
  s["m"] = momentum * s.get("m", 0) + g
  return p - lr * (g + momentum * s["m"] if nesterov else s["m"])


def np_lars(p, g, s, t, lr, wd, momentum=0.9, trust_coefficient=1e-3):
  g = g + wd * p
  if wd and p.any():  # biases and norms are not adapted, nor is what is zero
    g = g * trust_coefficient * np.sqrt((p**2).sum() / (g**2).sum())
  return np_sgd(p, g, s, t, lr, 0, momentum)


def np_lion(p, g, s, t, lr, wd, b1=0.9, b2=0.99):
  u = np.sign(b1 * s.get("m", 0) + (1 - b1) * g)
  average(s, "m", b2, g)
  return p - lr * (u + wd * p)


def np_adafactor(p, g, s, t, lr, wd, decay_rate=0.8, momentum=0.9, clipping_threshold=None,
                 beta2_cap=0.999, min_dim_size_to_factor=32):
  """big_vision's scale_by_adafactor; 2106.04560 sec. 3.4."""
  beta = min(beta2_cap, 1 - t**-decay_rate)
  if g.ndim == 2 and min(g.shape) >= min_dim_size_to_factor:
    rows, columns = (average(s, axis, beta, (g**2).mean(axis)) for axis in (1, 0))
    v = np.outer(rows, columns) / rows.mean()
  else:
    v = average(s, "v", beta, g**2)
  u = g / np.sqrt(v)
  if clipping_threshold:
    u = u / max(1, np.sqrt((u**2).mean()) / clipping_threshold)
  return p - lr * ((average(s, "m", momentum, u) if momentum else u) + wd * p)


@pytest.mark.parametrize("name,options", [
  ("adamw", {}), ("adamw", dict(debias=False)),
  ("adamw", dict(b1=0.5, b2=0.8, eps=0.1)), ("sgd", {}),
  ("sgd", dict(momentum=0.5, nesterov=True)), ("lars", {}),
  ("lars", dict(momentum=0.5, trust_coefficient=0.02)), ("lamb", {}),
  ("lamb", dict(b2=0.8, eps=0.1)), ("lamb", dict(always_adapt=True)), ("lion", {}),
  ("lion", dict(b1=0.5, b2=0.6)), ("adafactor", {}),
  ("adafactor", dict(momentum=None, decay_rate=0.5, clipping_threshold=0.5)),
  ("adafactor", dict(beta2_cap=0.3, min_dim_size_to_factor=128))])
def test_three_steps(name, options):
  """Stacked blocks must move as if each layer were a tensor of its own; two tensors are zero."""
  shapes = {"net/blocks/up/kernel": (2, 34, 130), "net/blocks/up/bias": (2, 130),
            "head/kernel": (6, 5), "head/bias": (5,), "net/blocks/mlp_scale": (2, 7)}
  tx, rate = optimizer.make(name=name, schedule=lambda step: (step + 1) / 4, batch_size=8, lr=0.2,
                            weight_decay=0.3, **options)
  params = filled(shapes, 0)
  # The second layer's numbers are of another size, so that norms over both layers are neither's.
  params["net"]["blocks"]["up"] = jax.tree.map(
    lambda x: x * np.array([1, 9], np.float32).reshape(2, *[1] * (x.ndim - 1)),
    params["net"]["blocks"]["up"])
  params["head"] = jax.tree.map(np.zeros_like, params["head"])
  params["net"]["blocks"]["mlp_scale"] = np.full((2, 7), 1e-4, np.float32)
  layers = {path: [np.float64(x) for x in (leaf if "blocks" in path else [leaf])]
            for path, leaf in flatten_dict(params, sep="/").items()}
  memory = {path: [{} for _ in parts] for path, parts in layers.items()}
  state, update = tx.init(params), jax.jit(tx.update)
  for t in (1, 2, 3):
    grads = filled(shapes, t)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for path, g in flatten_dict(grads, sep="/").items():
      parts = np.float64(g) if "blocks" in path else [np.float64(g)]
      layers[path] = [globals()[f"np_{name}"](p, part, s, t, 0.2 * t / 4,
                                              0.3 if path.endswith("kernel") else 0, **options)
                      for p, part, s in zip(layers[path], parts, memory[path])]
    np.testing.assert_allclose(rate(t - 1), 0.2 * t / 4)
  expected = {path: np.stack(parts) if "blocks" in path else parts[0]
              for path, parts in layers.items()}
  chex.assert_trees_all_close(flatten_dict(params, sep="/"), expected, rtol=2e-5, atol=1e-5)


def matrices(tree):
  """The matrices of stacked blocks, each layer's and each of query, key and value by itself."""
  tree = flatten_dict(tree["blocks"], sep="/")
  qkv = tree.pop("qkv_kernel")
  return {**{f"{path} {i}": x.reshape(-1, x.shape[-1]) for path, leaf in tree.items()
             for i, x in enumerate(leaf)},
          **{f"qkv {i} {j}": qkv[i, :, j].reshape(8, 8) for i in range(2) for j in range(3)}}


def test_muon_is_optax_muon_on_each_layers_matrices():
  shapes = {"blocks/qkv_kernel": (2, 8, 3, 2, 4), "blocks/out/kernel": (2, 2, 4, 8),
            "blocks/up/kernel": (2, 8, 12), "blocks/down/kernel": (2, 12, 8)}
  tx, _ = optimizer.make(name="muon", schedule=lambda step: 1.0, batch_size=8, lr=0.1,
                         weight_decay=0.3)
  theirs = optax.contrib.muon(0.1, weight_decay=0.3, consistent_rms=0.2)
  params = filled(shapes, 0)
  separate = matrices(params)
  state, their_state = tx.init(params), theirs.init(separate)
  update, their_update = jax.jit(tx.update), jax.jit(theirs.update)
  for t in (1, 2):
    grads = filled(shapes, t)
    updates, state = update(grads, state, params)
    expected, their_state = their_update(matrices(grads), their_state, separate)
    chex.assert_trees_all_close(matrices(updates), expected, atol=1e-5)
    for name, u in matrices(updates).items():
      # Nearly orthogonal: singular values about 0.2 sqrt(longer side), as Newton-Schulz spreads.
      values = np.linalg.svd(u / 0.1 + 0.3 * separate[name], compute_uv=False)
      values = values / (0.2 * max(u.shape)**0.5)
      assert 0.3 < values.min() and values.max() < 1.3
    params = optax.apply_updates(params, updates)
    separate = optax.apply_updates(separate, expected)


def test_muon_is_adamw_on_all_else():
  shapes = {"blocks/up/bias": (2, 12), "head/kernel": (4, 3), "cls": (1, 1, 8)}
  tx, _ = optimizer.make(name="muon", schedule=lambda step: 1.0, batch_size=8, lr=0.1)
  params = filled(shapes, 0)
  state, expected, memory = tx.init(params), flatten_dict(params), {}
  for t in (1, 2):
    grads = filled(shapes, t)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    for path, g in flatten_dict(grads).items():
      expected[path] = np_adamw(np.float64(expected[path]), np.float64(g),
                                memory.setdefault(path, {}), t, 0.1, 0, b2=0.95)
  chex.assert_trees_all_close(flatten_dict(params), expected, atol=1e-5)


DECAYS = {"kernel", "qkv_kernel"}
STAYS = {"bias", "qkv_bias", "scale", "table", "cls", "cls_position", "registers", "probe",
         "mask_token", "prefix_position", "attention_scale", "mlp_scale"}


@pytest.fixture(scope="module")
def network():
  """Parameters of a ViT and an MAE that between them have every kind there is."""
  image = jnp.zeros((1, 8, 8, 3))
  order = jnp.arange(4).reshape(1, 4)

  def init():
    classifier = vit.make(**TINY, pool="map", num_classes=3, layer_scale=0.1, qk_norm=True)
    masked = mae.make(**{**TINY, "depth": 1}, positions="learned", registers=1, decoder_width=8,
                      decoder_depth=1, decoder_heads=2)
    return {"vit": classifier.init(jax.random.key(0), image)["params"],
            "mae": masked.init(jax.random.key(0), image, order[:, :2], order)["params"]}
  params = jax.tree.map(lambda s: normal(*s.shape), jax.eval_shape(init))
  assert {path[-1] for path in flatten_dict(params)} == DECAYS | STAYS
  return params


def test_every_file_of_optimizers_is_named():
  assert sorted(optimizer.OPTIMIZERS) == sorted(
    path.stem for path in Path(adamw.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_exactly_the_kernels_decay(network, name):
  """Without gradients only decay moves a parameter."""
  tx, _ = optimizer.make(name=name, schedule=lambda step: 1.0, batch_size=8, lr=0.1,
                         weight_decay=0.5)
  updates = flatten_dict(one_step(tx, network, jax.tree.map(np.zeros_like, network)), sep="/")
  moved = {path for path, u in updates.items() if np.any(u)}
  assert moved == {path for path in updates if path.split("/")[-1] in DECAYS}
  if name in ("adamw", "lion", "adafactor"):
    flat = flatten_dict(network, sep="/")
    for path in moved:
      np.testing.assert_allclose(updates[path], -0.05 * flat[path], rtol=1e-6)


def test_decay_by_pattern(network):
  tx, _ = optimizer.make(schedule=lambda step: 1.0, batch_size=8, lr=0.1, weight_decay=0.5,
                         decay="^vit/.*(mlp/.*kernel|table)$")
  updates = flatten_dict(one_step(tx, network, jax.tree.map(np.zeros_like, network)), sep="/")
  moved = {path for path, u in updates.items() if np.any(u)}
  blocks = "vit/transformer/blocks/mlp"
  assert moved == {f"{blocks}/up/kernel", f"{blocks}/down/kernel", "vit/map_pool/mlp/up/kernel",
                   "vit/map_pool/mlp/down/kernel", "vit/position/table"}


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_clipping_by_global_norm(clip_norm):
  grads = filled({"blocks/kernel": (2, 3, 4), "bias": (5,)}, 0)
  tx, _ = optimizer.make(name="sgd", momentum=0.0, schedule=lambda step: 1.0, batch_size=8, lr=1.0,
                         clip_norm=clip_norm)
  norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads)))
  factor = min(1, clip_norm / norm) if clip_norm else 1
  chex.assert_trees_all_close(one_step(tx, grads, grads),
                              jax.tree.map(lambda g: -factor * g, grads), rtol=1e-6)


def test_base_lr_is_for_256_examples():
  kernel = {"kernel": normal(3, 2)}
  tx, rate = optimizer.make(name="lion", schedule=lambda step: 1 / (step + 2), batch_size=1024,
                            base_lr=3e-3)
  np.testing.assert_allclose([rate(0), rate(6)], [6e-3, 1.5e-3], rtol=1e-6)
  np.testing.assert_allclose(np.abs(one_step(tx, kernel, kernel)["kernel"]), 6e-3, rtol=1e-6)


@pytest.mark.parametrize("fields,message", [
  ({}, "lr or base_lr"), ({"lr": 1.0, "base_lr": 1.0}, "lr or base_lr"),
  ({"lr": 1.0, "name": "sgd", "b1": 0.9}, r"optimizer.b1: sgd takes momentum, nesterov")])
def test_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make(schedule=lambda step: 1.0, batch_size=8, **fields)


# --- The training step ----------------------------------------------------------------------------

def regression_loss(params, extra, batch, rng, step):
  residual = batch["x"] @ params["w"] - batch["y"]
  extra = {"seen": extra["seen"] + residual.shape[0]}
  return jnp.square(residual).mean(), (extra, {"bias": residual.mean()})


@pytest.mark.parametrize("accumulate,average", [(1, "ema_decay"), (4, "ema_decay"),
                                                (1, "ema_gamma")])
def test_step_is_gradient_descent(accumulate, average):
  chex.clear_trace_counter()
  method = Method(init=None, loss=regression_loss, predict={})
  tx, _ = optimizer.make(name="sgd", momentum=0.0, schedule=lambda step: 1 / (step + 1),
                         batch_size=8, lr=0.2)
  step = jax.jit(chex.assert_max_traces(n=1)(make_step(
    method, tx, lambda rng, batch: batch, seed=0, accumulate=accumulate,
    **{average: {"ema_decay": 0.7, "ema_gamma": 1.5}[average]})))
  w0 = normal(3)
  state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.asarray(w0)}, tx.init({"w": w0}),
                     {"seen": jnp.zeros((), jnp.int32)}, {"w": jnp.asarray(w0)})
  path = [np.float64(w0)]
  for t in range(4):
    x, y = normal(8, 3, seed=t), normal(8, seed=10 + t)
    state, metrics = step(state, {"x": x, "y": y})
    residual = np.float64(x) @ path[-1] - y
    gradient = 2 * residual @ x / 8
    path.append(path[-1] - 0.2 / (t + 1) * gradient)
    chex.assert_trees_all_close(
      metrics, {"loss": (residual**2).mean(), "bias": residual.mean(),
                "grad_norm": np.linalg.norm(gradient)}, rtol=1e-5, atol=1e-6)
  assert (int(state.step), int(state.extra["seen"])) == (4, 32)
  np.testing.assert_allclose(state.params["w"], path[4], rtol=1e-5, atol=1e-6)
  weights = [0.7**4, *(0.3 * 0.7**(4 - i) for i in range(1, 5))]
  if average == "ema_gamma":  # the integral of (gamma + 1) s^gamma / 4^(gamma + 1) over each step
    weights = np.diff(np.arange(5)**2.5, prepend=0) / 4**2.5
  ema = np.tensordot(weights, path, 1)
  np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_has_statistics_of_its_own(accumulate):
  """Running means of a network whose features are x * w: those of the average are x * its w."""
  def loss(params, extra, batch, rng, step):
    part = batch["x"] * params["w"]
    mean = 0.9 * extra["net"]["batch_stats"]["mean"] + 0.1 * part.mean()
    return part.mean(), ({"net": {"batch_stats": {"mean": mean}}, "steps": extra["steps"] + 1}, {})

  method = Method(None, loss, {}, statistics="net/batch_stats")
  extra = {"net": {"batch_stats": {"mean": jnp.zeros(())}}, "steps": jnp.zeros((), jnp.int32)}
  assert statistics(method, extra) == extra["net"]["batch_stats"]
  tx = optax.sgd(0.5)
  step = jax.jit(make_step(method, tx, lambda rng, batch: batch, seed=0, ema_decay=0.5,
                           accumulate=accumulate))
  w = {"w": jnp.float32(8.0)}
  state = TrainState(jnp.zeros((), jnp.int32), w, tx.init(w), extra, dict(w),
                     {"mean": jnp.zeros(())})
  own_mean, own_w, ema_w, ema_mean = 0.0, 8.0, 8.0, 0.0
  for t in range(3):
    x = normal(4, seed=t)
    state, _ = step(state, {"x": x})
    for part in (x[i::accumulate] for i in range(accumulate)):
      own_mean = 0.9 * own_mean + 0.1 * part.mean() * own_w
    own_w -= 0.5 * x.mean()
    ema_w = 0.5 * ema_w + 0.5 * own_w
    ema_mean = 0.9 * ema_mean + 0.1 * x[::accumulate].mean() * ema_w
  np.testing.assert_allclose(
    [state.extra["net"]["batch_stats"]["mean"], state.ema["w"], state.ema_statistics["mean"]],
    [own_mean, ema_w, ema_mean], rtol=1e-5)
  assert abs(own_mean - ema_mean) > 1e-3
  evaluated = with_statistics(method, state.extra, state.ema_statistics)
  assert evaluated["net"]["batch_stats"] is state.ema_statistics
  assert evaluated["steps"] is state.extra["steps"]


def test_accumulation_changes_no_draw():
  """Noise on images and random masks are those of the whole batch."""
  model = mae.make(**{**TINY, "depth": 1}, decoder_width=8, decoder_depth=1, decoder_heads=2)
  method = mae_method.make(model, mask_ratio=0.5)
  batch = {"image": normal(8, 8, 8, 3)}
  shapes, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
  params = jax.tree.map(lambda s: normal(*s.shape, scale=0.3), shapes)
  tx = optax.sgd(0.1)

  def augment(rng, batch):
    return {"image": batch["image"] + jax.random.uniform(rng, batch["image"].shape)}

  def run(accumulate):
    step = make_step(method, tx, augment, seed=3, accumulate=accumulate)
    state, metrics = jax.jit(step)(
      TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra, None), batch)
    return state.params, metrics

  whole, parts = run(1), run(4)
  chex.assert_trees_all_close(parts, whole, atol=1e-6)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0], params)
  assert max(jax.tree.leaves(moved)) > 0.01


def test_randomness_is_a_function_of_seed_and_step():
  def loss(params, extra, batch, rng, step):
    drawn = {"augment": batch["augment"][0], "draw": batch["draw"][0],
             "loss_key": jax.random.uniform(rng)}
    return params["w"], (extra, drawn)

  method = Method(None, loss, {}, lambda rng, batch: {**batch, "draw": jax.random.uniform(rng, 2)})
  tx = optax.sgd(0.1)
  start = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(())}, tx.init({"w": jnp.ones(())}),
                     {}, None)

  def draws(seed, steps, state=start):
    step = jax.jit(make_step(
      method, tx, lambda rng, batch: {**batch, "augment": jax.random.uniform(rng, 2)}, seed=seed))
    out = []
    for _ in range(steps):
      state, metrics = step(state, {})
      out.append([float(metrics[k]) for k in ("augment", "draw", "loss_key")])
    return out

  first = draws(0, 3)
  assert draws(0, 1, start._replace(step=jnp.asarray(2, jnp.int32))) == first[2:]
  every = np.ravel(first + draws(1, 3))
  assert len(np.unique(every)) == len(every) == 18


# --- FLOPs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("scan", [False, True])
def test_flops_of_a_vit_and_its_gradient(scan):
  model = vit.make(**{**TINY, "depth": 3}, num_classes=5, scan=scan)
  image = jnp.zeros((2, 8, 8, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), image)
  b, patches, d, hidden, depth = 2, 4, 8, 12, 3
  n = patches + 1
  embed = patches * (4 * 4 * 3) * d
  block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * hidden
  forward = 2 * b * (embed + depth * block + d * 5)
  assert count_flops(lambda p, x: model.apply(p, x)[0], params, image) == forward
  gradient = jax.grad(lambda p, x: model.apply(p, x)[0].sum())
  # Twice the forward again, but no gradient of the image.
  assert count_flops(gradient, params, image) == 3 * forward - 2 * b * embed


@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 3)])
def test_flops_of_a_convolution(stride, groups):
  image, kernel = jnp.zeros((2, 9, 7, 6)), jnp.zeros((3, 2, 6 // groups, 12))

  def convolve(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (stride, stride), "VALID",
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                        feature_group_count=groups)
  rows, columns = (7 - 1) // stride + 1, (6 - 1) // stride + 1
  one_output = 3 * 2 * (6 // groups)  # multiply-adds
  assert count_flops(convolve, image, kernel) == 2 * 2 * rows * columns * 12 * one_output
