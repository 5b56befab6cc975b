"""Diffusion end to end: guidance, meshes, bad input; the frame's maths is tested beside it."""

import functools

import jax
import numpy as np
import pytest
from tiers import suite

from diffusion import grids, guidance, paths, predictions, samplers
from methods import diffusion
from models import dit
from trainer import recipe, sharding

SMALL = dict(image_size=16, channels=1, patch=4, width=32, depth=2, heads=2, mlp_dim=64)


def make(num_classes=3, samples=None, **fields):
  model = dit.make(num_classes=num_classes, **SMALL, **fields.pop("model", {}))
  method = diffusion.make(model, samples=samples or {"sample": dict(steps=3)}, **fields)
  batch = {"image": jax.random.normal(jax.random.key(0), (8, 16, 16, 1)),
           "label": np.arange(8, dtype=np.int32) % 3}

  @jax.jit
  def init(batch):
    params, extra = method.init(jax.random.key(1), batch)
    return jax.tree.map(  # adaLN-Zero starts at zero: nothing would depend on the label
      lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params), extra
  params, extra = init(batch)
  return model, method, batch, params, extra


jitted = functools.lru_cache(jax.jit)


def sample(method, params, batch, name="sample", seed=3, **more):
  return np.asarray(jitted(method.predict[name])(params, {}, {**batch, **more},
                                                 jax.random.key(seed)))


def test_guidance_0_is_unconditional_and_1_conditional_bit_for_bit():
  samples = {"sample": dict(steps=3), "none": dict(steps=3, guidance_scale=0.0),
             "given": dict(steps=3, guidance_scale=1.0)}
  _, method, batch, params, _ = make(samples=samples)
  asked = {"label": batch["label"]}
  null = {"label": np.full(8, 3, np.int32)}
  given = sample(method, params, asked, "given")
  none = sample(method, params, null, "given")
  assert np.abs(given - none).max() > 1e-3
  np.testing.assert_array_equal(sample(method, params, asked, "none"), none)
  for scale, expected in ((0.0, none), (1.0, given)):
    guidance = np.full(8, scale, np.float32)
    np.testing.assert_allclose(sample(method, params, asked, guidance=guidance), expected,
                               atol=1e-5)
  two = sample(method, params, asked, guidance=np.full(8, 2.0, np.float32))
  assert np.abs(two - given).max() > 1e-3


def test_guidance_leaves_a_learned_variance_alone():
  """As DiT's forward_with_cfg: what it does not guide comes from the conditional branch."""
  options = dict(sampler="ddpm", sampler_options=dict(variance="learned"), steps=2,
                 grid="quadratic", grid_options=dict(start=16))  # the bounds are far apart there
  model, method, batch, params, _ = make(
    path="vp_discrete", prediction="eps", model=dict(learn_sigma=True),
    samples={"sample": options, "all": dict(options, guidance_channels=2)})
  noise = np.asarray(jax.random.normal(jax.random.key(5), (8, 16, 16, 1)))
  label, scale, rng = batch["label"], 3.0, jax.random.key(3)
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  high, low = alpha_bar[16], alpha_bar[0]
  x, t, beta = noise * np.sqrt(1 - high), np.full(8, 16, np.float32), 1 - high / low
  apply = jax.jit(model.apply)
  given, none = (np.float64(apply({"params": params}, x, t, y)) for y in (
    label, np.full(8, 3, np.int32)))
  eps = (none + scale * (given - none))[..., :1]
  x0 = (x - np.sqrt(1 - high) * eps) / np.sqrt(high)
  mean = (np.sqrt(low) * beta * x0 + np.sqrt(1 - beta) * (1 - low) * x) / (1 - high)
  small, share = beta * (1 - low) / (1 - high), (given[..., 1:] + 1) / 2
  std = np.exp((share * np.log(beta) + (1 - share) * np.log(small)) / 2)
  drawn = jax.random.normal(jax.random.fold_in(jax.random.split(rng)[1], 0), noise.shape)
  asked = {"label": label, "noise": noise, "guidance": np.full(8, scale, np.float32)}
  path, everything = (np.asarray(jax.jit(method.predict[name])(params, {}, asked, rng)["x"][:, 1])
                      for name in ("sample_path", "all_path"))
  np.testing.assert_allclose(path, mean + std * drawn, atol=1e-5)
  assert np.abs(path - everything).max() > 1e-3


def test_a_limit_and_its_options_reach_the_sampler():
  step = dict(sampler="ddim", steps=1)  # so that the sample is the limited x_0
  _, method, batch, params, _ = make(samples={
    "sample": step, "threshold": dict(step, limit="threshold"), "clip": dict(step, limit="clip"),
    "held": dict(step, limit="threshold", limit_options=dict(quantile=0.9, ceiling=1.25))})
  asked = {"label": batch["label"]}
  free = sample(method, params, asked).astype(np.float64)
  for name, quantile, ceiling in (("threshold", 0.995, np.inf), ("held", 0.9, 1.25)):
    size = np.quantile(np.abs(free).reshape(8, -1), quantile, axis=1)
    assert (size > 1.1).all()  # else nothing is told apart
    size = np.clip(size, 1, ceiling)[:, None, None, None]
    np.testing.assert_allclose(sample(method, params, asked, name),
                               np.clip(free, -size, size) / size, atol=1e-5)
  np.testing.assert_allclose(sample(method, params, asked, "clip"), np.clip(free, -1, 1), atol=1e-6)


@pytest.mark.parametrize("options,calls", [
  (dict(sampler="ddim", steps=3), 3), (dict(sampler="heun", steps=3), 5)])
def test_path_of_a_sampler(options, calls):
  _, method, batch, params, _ = make(samples={"sample": options})
  noise = np.asarray(jax.random.normal(jax.random.key(5), (8, 16, 16, 1)))
  inputs = {"label": batch["label"], "noise": noise}
  path = jax.tree.map(np.asarray, jax.jit(method.predict["sample_path"])(
    params, {}, inputs, jax.random.key(3)))
  assert path["x"].shape == (8, calls + 1, 16, 16, 1) and path["x0"].shape[:2] == (8, calls)
  np.testing.assert_array_equal(path["x"][:, 0], noise)                      # sigma is 1 at t = 1
  np.testing.assert_allclose(path["x"][:, -1], sample(method, params, inputs), atol=1e-6)
  for k in range(calls):  # x is before the call at its t: velocity = noise - x_0, x_t - x_0 = t v
    t, x = path["t"][0, k], path["x"][:, k]
    velocity = method.predict["denoise"](params, {}, {"image": x, "t": np.full(8, t),
                                                      "label": batch["label"]}, None)
    np.testing.assert_allclose(path["x0"][:, k], x - t * velocity, atol=1e-4)


@pytest.mark.parametrize("options", suite([
  dict(sampler="heun", steps=3), dict(sampler="euler_maruyama", steps=3, grid_options=dict(
    start=0.99))], 0), ids=lambda o: o["sampler"])
def test_same_seed_same_images_on_any_mesh(options):
  _, method, batch, params, _ = make(samples={"sample": options})
  alone = sample(method, params, {"label": batch["label"]})
  for mesh in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh(**mesh)
    there = jax.device_put(params, sharding.shard_state(params, mesh))
    label = jax.device_put(batch["label"], sharding.batch_sharding(mesh))
    np.testing.assert_allclose(sample(method, there, {"label": label}), alone, atol=1e-5)
  assert np.abs(sample(method, params, {"label": batch["label"]}, seed=4) - alone).max() > 0.1


@pytest.mark.parametrize("fields", suite([
  dict(), dict(path="vp_cosine", prediction="v"), dict(path="edm", prediction="edm",
  times="log_normal", weighting="edm", samples={"sample": dict(sampler="edm", grid="karras",
                                                               steps=3)}),
  dict(path="vp_discrete", prediction="eps", weighting="snr", model=dict(learn_sigma=True),
       samples={"sample": dict(sampler="ddpm", grid="discrete", steps=3,
                               sampler_options=dict(variance="learned"))}),
  dict(path="ve", prediction="score", weighting="sigma2", samples={"sample": dict(
    sampler="heun", steps=3, grid_options=dict(end=1e-5))}),
  dict(num_classes=0)], 3, 5), ids=str)
def test_every_corner_of_the_frame_trains_and_samples(fields):
  model, method, batch, params, extra = make(**fields)
  drawn = method.draw(jax.random.key(5), batch)
  (value, (after, _)), grads = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
    params, extra, drawn, jax.random.key(6), 0)
  assert np.isfinite(value) and after == {}
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  image = sample(method, params, batch if not model.num_classes else {"label": batch["label"]},
                 noise=np.ones((8, 16, 16, 1), np.float32))
  assert image.shape == (8, 16, 16, 1) and np.isfinite(image).all()


def embedded_times(monkeypatch):
  """List of what `models.dit.Condition` is given from now on: arrays as they reach the sinusoid."""
  seen, features = [], dit.timestep_features

  def spy(t, *args):
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
    return features(t, *args)

  monkeypatch.setattr(dit, "timestep_features", spy)
  return seen


@pytest.mark.parametrize("variant, fields, scale", suite([
  ("imagenet_sit_xl2", {}, 1), ("imagenet_sit_xl2", {"time_scale": None}, 1000),
  ("", {}, 1000), ("imagenet_dit_xl2", {}, 1)], 0, 2, unpack=True))
def test_times_reach_the_embedding_on_the_recipes_scale(variant, fields, scale, monkeypatch):
  """willisma/SiT models.py embeds t in [0, 1] itself; without the field a run keeps its 1000."""
  config = recipe.load_config(f"configs/diffusion.py:{variant}")
  options = {name: config.method[name] for name in ("path", "prediction", "time_scale")
             if name in config.method} | fields
  seen = embedded_times(monkeypatch)
  _, method, batch, params, _ = make(
    **options, model=dict(learn_sigma=config.model.get("learn_sigma", False)),
    samples={"sample": dict(sampler="ddim", steps=2)})
  drawn = method.draw(jax.random.key(5), batch)
  method.loss(params, {}, drawn, jax.random.key(6), 0)
  jax.effects_barrier()
  np.testing.assert_array_equal(seen[-1], np.float32(drawn["time"]) * np.float32(scale))
  t = np.linspace(0.25, 0.75, 8, dtype=np.float32)
  method.predict["denoise"](params, {}, {**batch, "t": t}, None)
  jax.effects_barrier()
  np.testing.assert_array_equal(seen[-1], t * np.float32(scale))


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", suite(["float32", "bfloat16"], 1))
@pytest.mark.parametrize("start", suite([999.0, 998.5], 0))
def test_times_keep_their_digits_in_bfloat16(start, dtype, x_dtype, monkeypatch):
  """bfloat16 has 8 bits, so that both would be 1000: a time that no model was trained at."""
  seen = embedded_times(monkeypatch)
  model, method, batch, params, _ = make(
    path="vp_discrete", prediction="v", model=dict(dtype=dtype),
    samples={"sample": dict(sampler="ddim", steps=2, grid_options=dict(start=start))})
  x, label, path = batch["image"].astype(x_dtype), batch["label"], paths.vp_discrete()
  network = guidance.guided(lambda *args: model.apply({"params": params}, *args), label,
                            np.full(8, 3, np.int32), 2.0)
  denoise = predictions.denoiser(network, "v", path)
  calls = [
    lambda: samplers.sample(denoise, x, grids.make("uniform", path, 2, start=start), path),
    lambda: sample(method, params, {"label": label, "noise": x}),
    lambda: method.predict["denoise"](params, {}, {
      "image": x, "label": label, "t": np.full(8, start, np.float32)}, None)]
  for call in calls:
    seen.clear()
    assert np.isfinite(np.float32(call())).all()
    jax.effects_barrier()
    times = sorted({(t.dtype.name, *np.unique(t)) for t in seen})
    assert times[-1] == ("float32", start)
    assert times[:-1] in ([], [("float32", (start - 1) / 2)])


def test_labels_are_dropped_as_often_as_asked():
  _, method, batch, _, _ = make(label_dropout=0.25)
  big = {"image": np.zeros((4000, 16, 16, 1), np.float32)}
  share = np.asarray(method.draw(jax.random.key(0), big)["drop"]).mean()
  assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("overrides, message", [
  ({"method.path": "liner"}, "did you mean 'linear'"),
  ({"method.prediction": "velocty"}, "did you mean 'velocity'"),
  ({"method.label_dropout": "1.0"}, r"method.label_dropout = 1.0: expected a number in \[0, 1\)"),
  ({"method.samples.sample.steps": "0"}, "steps = 0: expected at least one"),
  ({"method.samples.sample.sampler": "huen"}, "did you mean 'heun'"),
  ({"method.samples.sample.stepps": "3"}, "method.samples.sample: .*stepps"),
  ({"method.samples.sample.limit": "threshhold"}, "did you mean 'threshold'"),
  ({"method.samples.sample.limit": "threshold", "method.samples.sample.limit_options":
    "{'ceiling': 0.5}"}, "ceiling = 0.5: expected .* at least 1"),
  ({"method.samples.sample.limit_options": "{'ceiling': 2.0}"}, "method.samples.sample: .*ceiling"),
  ({"method.path": "vp_discrete", "method.prediction": "eps"}, "needs d alpha / dt"),
  ({"method.path": "vp_discrete", "method.prediction": "velocity"}, "did you mean 'v'"),
  ({"method.path": "edm", "method.times": "logit_normal"}, "logit_normal"),
  ({"method.samples.sample.grid_options": "{'start': 2.0}"}, "2 is outside path 'linear'"),
  ({"model.learn_sigma": "true"}, "model.learn_sigma needs method.path = 'vp_discrete'"),
])
def test_bad_input(overrides, message, data_dir):
  with pytest.raises(ValueError, match=message):
    recipe.build(recipe.load_config("configs/diffusion.py:smoke", overrides), data_dir)
