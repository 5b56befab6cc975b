"""Samplers and grids against closed forms: Gaussian data, whose every map and moment is known."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import suite

from diffusion import grids, guidance, paths, predictions, samplers
from models import dit

MEAN = np.array([0.3, -0.5])
ROTATION = np.array([[0.8, -0.6], [0.6, 0.8]])
SCALES = np.array([0.4, 1.1])  # standard deviations along the rotated axes
COVARIANCE = (ROTATION * SCALES**2) @ ROTATION.T
SPANS = {"linear": (0.95, 0.05), "gvp": (0.9, 0.05), "vp_linear": (0.8, 0.02),
         "vp_cosine": (0.95, 0.03), "ve": (0.8, 0.2), "edm": (20.0, 0.05),
         "vp_discrete": (900.0, 20.0)}


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def optimal(path):
  """E[x_0 | x_t] and E[eps | x_t] for data N(MEAN, COVARIANCE)."""
  def denoise(x, t):
    alpha, sigma = path.alpha(t), path.sigma(t)
    y = (x - alpha * MEAN[None]) @ ROTATION
    spread = alpha**2 * SCALES[None]**2 + sigma**2
    x0 = MEAN[None] + (alpha * SCALES[None]**2 / spread * y) @ ROTATION.T
    return x0.astype(x.dtype), ((sigma / spread * y) @ ROTATION.T).astype(x.dtype)
  return denoise


def exact_map(path, x, start, end):
  """Where the probability-flow ODE takes x: coordinates keep their place in units of spread."""
  (alpha, sigma), (alpha_end, sigma_end) = (
    (path.alpha(np.float64(t)), path.sigma(np.float64(t))) for t in (start, end))
  ratio = np.sqrt((alpha_end**2 * SCALES**2 + sigma_end**2) / (alpha**2 * SCALES**2 + sigma**2))
  return alpha_end * MEAN + ((x - alpha * MEAN) @ ROTATION * ratio) @ ROTATION.T


def frame_of(name, sampler):
  """A path that a sampler can work on, the optimal denoiser and the times it runs between."""
  path, (start, end) = paths.PATHS[name](), SPANS[name]
  denoise = optimal(path)
  derivatives = sampler in ("euler", "heun", "euler_maruyama")
  if sampler == "edm" and name != "edm" or derivatives and path.d_alpha is None:
    batched = optimal(path)
    denoise, frame = predictions.sigma_frame(
      lambda x, t: batched(x, t[:, None]), path)
    return denoise, frame, *np.exp(-path.log_snr(np.array([start, end])) / 2)
  return denoise, path, start, end


# --- Order ----------------------------------------------------------------------------------------

ORDERS = {
  "euler": ({}, 1), "ddim": ({}, 1), "heun": ({}, 2), "edm": ({}, 2), "dpmpp_2m": ({}, 2),
  "dpmpp_2m heun": ({"solver": "heun"}, 2), "dpmpp_2s": ({}, 2), "dpm_2m": ({}, 2),
  "dpmpp_2m of order 1": ({"order": 1}, 1), "edm of order 1": ({"order": 1}, 1)}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("name", suite(SPANS, 0, 1, 3))
def test_order_of_convergence(float64, name, case):
  sampler, (options, order) = case.split(" ")[0], ORDERS[case]
  denoise, path, start, end = frame_of(name, sampler)
  x = np.random.default_rng(0).normal(0, path.sigma(np.float64(start)), (4, 2))
  expected, steps = exact_map(path, x, start, end), np.array([64, 128, 256])
  errors = []
  for n in steps:
    log_snr = np.linspace(*path.log_snr(np.array([start, end])), n + 1)
    times = np.concatenate([[start], path.inverse(log_snr)[1:-1], [end]])
    out = jax.jit(lambda x, times=times: samplers.sample(
      denoise, x, times, path, sampler, **options))(x)
    errors.append(np.linalg.norm(out - expected))
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert abs(slope - order) < 0.15, (slope, errors)


def test_third_order(float64):
  """On a grid whose first step, of order 1 as there is one call, is short.

  The published formula is closer than order 2 is, but no order higher; the full one is.
  """
  path = paths.PATHS["linear"]()
  x = np.random.default_rng(0).normal(0, 0.95, (4, 2))
  errors = {}
  for n in (64, 128):
    u = np.linspace(0, 1, n + 1)**2
    times = path.inverse(path.log_snr(np.float64(0.95)) * (1 - u) + u * path.log_snr(
      np.float64(0.05)))
    for sampler, full in (("dpmpp_2m", False), ("dpmpp_3m", False), ("dpmpp_3m", True)):
      out = samplers.sample(optimal(path), x, times, path, sampler, full_third=full)
      errors[sampler, full, n] = np.linalg.norm(out - exact_map(path, x, times[0], times[-1]))
  assert errors["dpmpp_3m", False, 128] < errors["dpmpp_2m", False, 128] / 3
  slope = np.log2(errors["dpmpp_3m", True, 64] / errors["dpmpp_3m", True, 128])
  assert abs(slope - 3) < 0.15, errors


# --- Moments --------------------------------------------------------------------------------------

STOCHASTIC = {
  "ddpm": {}, "ddpm large": {"variance": "large"}, "ddim": {"eta": 0.6}, "euler_ancestral": {},
  "sde_dpmpp_2m": {}, "euler_maruyama": {}, "euler_maruyama sigma": {
    "diffusion": "sigma", "scale": 0.5, "last_noise": True},
  "euler_maruyama own": {"diffusion": lambda path, t: path.alpha(t) * path.sigma(t)},
  "edm": {"churn": 30.0, "s_min": 0.05, "s_max": 10.0, "s_noise": 1.0}}


def moments(name, case, steps):
  """Mean and covariance of what a sampler makes of x_start, exactly: all of it is affine.

  Examples are x_start's mean, and that with one direction of x or of one call's noise added.
  """
  denoise, path, times = stochastic_run(name, case, steps)
  sampler, options = case.split(" ")[0], STOCHASTIC[case]
  mean, root = start_of(path, times)
  calls = len(samplers.table(sampler, path, times, **options).t)
  x = mean + np.concatenate([np.zeros((1, 2)), root.T, np.zeros((2 * calls, 2))])
  noise = np.zeros((calls, len(x), 2))
  noise[np.arange(calls).repeat(2), np.arange(3, len(x)), np.tile([0, 1], calls)] = 1
  out = np.asarray(jax.jit(lambda x, noise: samplers.sample(
    denoise, x, times, path, sampler, noise=noise, **options))(x, noise))
  return out[0], (out[1:] - out[:1]).T @ (out[1:] - out[:1])


def stochastic_run(name, case, steps):
  denoise, path, start, end = frame_of(name, case.split(" ")[0])
  log_snr = np.linspace(*path.log_snr(np.array([start, end])), steps + 1)
  return denoise, path, np.concatenate([[start], path.inverse(log_snr)[1:-1], [end]])


def start_of(path, times):
  """Mean [1, 2] and a root of the covariance [2, 2] of x at times[0]."""
  alpha, sigma = path.alpha(times[0]), path.sigma(times[0])
  return alpha * MEAN[None], ROTATION * np.sqrt(alpha**2 * SCALES**2 + sigma**2)


@pytest.mark.parametrize("name", suite(["linear", "vp_linear", "edm", "vp_discrete"], 0, 3))
@pytest.mark.parametrize("case", STOCHASTIC)
def test_moments_converge_to_the_datas(float64, name, case):
  """Without sampling error: at least at order 1 in the number of steps."""
  _, path, times = stochastic_run(name, case, 1)
  alpha, sigma = path.alpha(times[-1]), path.sigma(times[-1])
  covariance = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
  errors = []
  for steps in (100, 200):
    mean, spread = moments(name, case, steps)
    errors.append(max(np.abs(mean - alpha * MEAN).max(), np.abs(spread - covariance).max()))
  assert errors[1] < 0.04 and errors[1] < 0.6 * errors[0], errors


@pytest.mark.parametrize("name, case", [("gvp", "ddpm"), ("linear", "euler_maruyama sigma"),
                                        ("edm", "edm"), ("vp_cosine", "sde_dpmpp_2m")])
def test_moments_of_drawn_samples(name, case):
  """20,000 of them in 12 steps have the exact moments within 4.5 standard errors."""
  with jax.enable_x64(True):
    mean, covariance = moments(name, case, 12)
  denoise, path, times = stochastic_run(name, case, 12)
  (start, root), keys, b = start_of(path, times), jax.random.split(jax.random.key(1)), 20_000
  x = start.astype("float32") + jax.random.normal(keys[0], (b, 2)) @ root.T.astype("float32")
  out = np.asarray(jax.jit(lambda x, rng: samplers.sample(
    denoise, x, times, path, case.split(" ")[0], rng=rng, **STOCHASTIC[case]))(x, keys[1]), float)
  variances = np.diag(covariance)
  assert (np.abs(out.mean(0) - mean) < 4.5 * np.sqrt(variances / b)).all()
  error = np.sqrt((np.outer(variances, variances) + covariance**2) / b)
  assert (np.abs(np.cov(out.T) - covariance) < 4.5 * error).all()


# --- Samplers that are each other's special case --------------------------------------------------

def on_noise(sampler, path, times, **options):
  calls = len(samplers.table(sampler, path, times, **options).t)
  rng = np.random.default_rng(0)
  return samplers.sample(optimal(path), path.sigma(times[:1]) * rng.normal(0, 1, (3, 2)), times,
                         path, sampler, noise=rng.normal(0, 1, (calls, 3, 2)), **options)


@pytest.mark.parametrize("name, one, other", [
  ("edm", ("euler", {}), ("ddim", {})),
  ("edm", ("euler", {}), ("edm", {"order": 1})),
  ("edm", ("heun", {}), ("edm", {})),
  ("edm", ("edm", {"churn": 4.0, "s_min": 100.0}), ("edm", {})),
  ("gvp", ("ddim", {}), ("dpmpp_2m", {"order": 1})),
  ("gvp", ("ddim", {}), ("dpm_2m", {"order": 1})),
  ("vp_discrete", ("ddpm", {}), ("ddim", {"eta": 1.0})),
  ("vp_cosine", ("euler_ancestral", {}), ("ddim", {"eta": 1.0})),
  ("gvp", ("sde_dpmpp_2m", {"order": 1}), ("ddpm", {})),
])
def test_special_cases(float64, name, one, other):
  times = np.linspace(*SPANS[name], 9)
  a, b = (on_noise(sampler, paths.PATHS[name](), times, **options)
          for sampler, options in (one, other))
  np.testing.assert_allclose(a, b, rtol=1e-9)


# Not of "dpm_2m", endless in log-SNR, nor of "euler_maruyama", whose drift is not the ODE's.
@pytest.mark.parametrize("sampler", sorted({*samplers.SAMPLERS} - {"dpm_2m", "euler_maruyama"}))
def test_one_step_to_the_data_is_the_denoisers_x0(float64, sampler):
  path = paths.PATHS["edm"]()
  x = np.random.default_rng(0).normal(0, 5, (3, 2))
  out = samplers.sample(optimal(path), x, np.array([5.0, 0.0]), path, sampler,
                        noise=np.zeros((1, 3, 2)))
  np.testing.assert_allclose(out, optimal(path)(x, 5.0)[0], rtol=1e-9)


def test_churn_raises_the_noise_where_it_may(float64):
  """One step of 2206.00364 alg. 2, written out."""
  path, x = paths.edm(), np.random.default_rng(0).normal(0, 8, (3, 2))
  noise = np.random.default_rng(1).normal(0, 1, (4, 3, 2))
  options = {"churn": 0.6, "s_min": 1.0, "s_max": 6.0, "s_noise": 1.007}
  times, y = np.array([8.0, 4.0, 0.5]), x
  for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
    raised = t * (1.3 if 1 <= t <= 6 else 1)
    y = y + 1.007 * np.sqrt(raised**2 - t**2) * noise[2 * i]
    d = (y - optimal(path)(y, raised)[0]) / raised
    euler = y + (s - raised) * d
    y = y + (s - raised) * (d + (euler - optimal(path)(euler, s)[0]) / s) / 2
  out = samplers.sample(optimal(path), x, times, path, "edm", noise=noise, **options)
  np.testing.assert_allclose(out, y, rtol=1e-9)


@pytest.mark.parametrize("last_noise", [False, True])
def test_the_last_step_of_euler_maruyama_draws_noise_if_asked(float64, last_noise):
  """Its size is sqrt(w dt), with w = 0.5 sigma_t and sigma_t = t."""
  path, x = paths.linear(), np.ones((3, 2))
  def end(size):
    return samplers.sample(optimal(path), x, [0.8, 0.5, 0.4], path, "euler_maruyama",
                           diffusion="sigma", scale=0.5, last_noise=last_noise,
                           noise=np.stack([np.zeros_like(x), np.full_like(x, size)]))
  expected = np.sqrt(0.5 * 0.5 * 0.1) if last_noise else 0
  np.testing.assert_allclose(end(1.0) - end(0.0), expected, rtol=1e-9, atol=1e-12)


def test_learned_variance_lies_between_the_bounds(float64):
  path, times = paths.vp_discrete(), np.array([600.0, 599.0])
  x, noise = np.zeros((3, 2)), np.ones((1, 3, 2))
  share = np.array([[-1, 1], [0, -1], [1, 1]])
  out = samplers.sample(lambda x, t: (x, x, jnp.asarray(share, x.dtype)), x, times, path, "ddpm",
                        noise=noise, variance="learned")
  beta = (1e-4 + 600 * (0.02 - 1e-4) / 999)
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  bounds = np.log([beta * (1 - bar[599]) / (1 - bar[600]), beta])
  expected = np.exp(((1 - share) * bounds[0] + (1 + share) * bounds[1]) / 4)
  np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_euler_from_the_floor_of_a_path_that_ends_at_zero_snr(float64):
  path = paths.vp_discrete(zero_snr=True, floor=2**-24)
  times, x = grids.make("discrete", path, 5), np.random.default_rng(0).normal(0, 1, (3, 2))
  sigmas, batched = grids.to_sigma(path, times), optimal(path)
  denoise, frame = predictions.sigma_frame(lambda x, t: batched(x, t[:, None]), path)
  assert sigmas[0] == pytest.approx(4096, rel=1e-6)
  np.testing.assert_allclose(samplers.sample(denoise, x * 4096, sigmas, frame, "euler"),
                             samplers.sample(optimal(path), x, times, path), rtol=1e-5)


# --- Running --------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpmpp_2m", "sde_dpmpp_2m", "edm"])
def test_eight_devices_are_one(sampler):
  path = paths.edm()
  times = grids.make("karras", path, 6)
  options = {"churn": 2.0} if sampler == "edm" else {}
  run = functools.partial(samplers.sample, optimal(path), times=times, path=path, sampler=sampler,
                          rng=jax.random.key(3), **options)
  x = 80 * jax.random.normal(jax.random.key(0), (16, 2))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  alone, plain, many = jax.jit(run)(x), run(x), jax.jit(run)(spread)
  assert len(many.sharding.device_set) == 8
  np.testing.assert_allclose(many, alone, atol=1e-5)
  np.testing.assert_allclose(plain, alone, atol=1e-5)
  if sampler not in ("heun", "dpmpp_2m"):
    assert np.abs(alone - jax.jit(functools.partial(run, rng=jax.random.key(4)))(x)).max() > 1e-3


def test_noise_of_a_call_is_its_own_key(float64):
  path, rng = paths.gvp(), jax.random.key(5)
  times, x = np.linspace(0.9, 0.1, 5), jnp.ones((3, 2))
  noise = np.stack([jax.random.normal(jax.random.fold_in(rng, k), x.shape) for k in range(4)])
  drawn, given = (samplers.sample(optimal(path), x, times, path, "ddpm", **how)
                  for how in ({"rng": rng}, {"noise": noise}))
  np.testing.assert_allclose(drawn, given, rtol=1e-9)


def test_trajectory_and_targets(float64):
  path = paths.vp_discrete()
  x = np.random.default_rng(0).normal(0, 1, (3, 2))
  times = grids.make("discrete", path, 4)
  end, states = samplers.sample(optimal(path), x, times, path, trajectory=True)
  chex.assert_shape([states["x"], states["x0"]], (4, 3, 2))
  np.testing.assert_array_equal(states["x"][-1], end)
  np.testing.assert_allclose(states["x0"][0], optimal(path)(x, 999.0)[0])
  single = samplers.sample(optimal(path), x, np.array([999.0, 700.0]), path)
  aside = samplers.sample(optimal(path), x, times, path, targets=np.array([700, 499, 249, -1]),
                          trajectory=True)[1]
  np.testing.assert_allclose(aside["x"][0], single)
  np.testing.assert_allclose(aside["x0"][1], optimal(path)(single, times[1])[0])


def test_the_denoiser_is_traced_once():
  path, traces = paths.edm(), []
  def denoise(x, t):
    traces.append(t)
    return optimal(path)(x, t)
  samplers.sample(denoise, jnp.ones((3, 2)), grids.make("karras", path, 9), path, "heun")
  assert len(traces) == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_respaced_sampling_of_the_published_dit(sampler):
  """Guided on three channels, learned variances, 10 of 1000 steps; noise and every x recorded."""
  io = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in
        published.arrays("schedulers", "dit").items()}
  model = dit.make(image_size=8, channels=4, patch=2, width=48, depth=2, heads=4, num_classes=10,
                   learn_sigma=True, positions="learned")
  params, _ = published.to_ours("dit/original", published.load("dit"), dict(heads=4, patch=2))
  b, null = 2, 10
  path = paths.vp_discrete()
  network = guidance.guided(
    lambda x, t, label: model.apply({"params": params}, x, t, label), io["label"],
    np.full(b, null), float(io["scale"]), channels=3)
  denoise = predictions.denoiser(network, "eps", path, learned_variance=True)
  times = grids.make("discrete", path, 10, spacing="linspace")
  options = {"noise": io["noise"], "variance": "learned"} if sampler == "ddpm" else {}
  _, states = jax.jit(lambda x: samplers.sample(denoise, x, times, path, sampler, trajectory=True,
                                                **options))(io["z"])
  # Guided random weights drive x to 700, and with it goes what rounding does.
  largest = np.abs(io[sampler]).max((1, 2, 3, 4), keepdims=True)
  np.testing.assert_allclose(states["x"] / largest, io[sampler] / largest, atol=2e-6)


# --- Grids ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid, path, options, expected", [
  ("uniform", "linear", {}, [1, 0.75, 0.5, 0.25, 0]),
  ("uniform", "linear", {"end": 0.1}, [1, 0.7, 0.4, 0.1, 0]),
  ("uniform", "vp_linear", {"start": 0.9, "final": 0.1}, [0.9, 0.7, 0.5, 0.3, 0.1]),
  ("quadratic", "linear", {}, [1, 9 / 16, 1 / 4, 1 / 16, 0]),
  ("quadratic", "vp_discrete", {"start": 800}, [800, 355, 88, 0, -1]),
  ("karras", "edm", {"rho": 1.0}, [80, 80 - 79.998 / 3, 80 - 79.998 / 3 * 2, 0.002, 0]),
  ("karras", "edm", {}, [80, 9.7232 + 0 * 7, 0.469979, 0.002, 0]),
  ("log_snr", "edm", {}, [80, 80 / 40_000**(1 / 3), 80 / 40_000**(2 / 3), 0.002, 0]),
  ("log_snr", "linear", {"start": 0.9, "end": 0.1}, [
    0.9, 9**(1 / 3) / (1 + 9**(1 / 3)), 1 / (1 + 9**(1 / 3)), 0.1, 0]),
  ("shifted", "linear", {"shift": 3.0}, [1, 0.9, 0.75, 0.5, 0]),
  ("discrete", "vp_discrete", {"spacing": "leading"}, [750, 500, 250, 0, -1]),
  ("discrete", "vp_discrete", {"spacing": "leading", "offset": 1, "final": 0.0},
   [751, 501, 251, 1, 0]),
  ("discrete", "vp_discrete", {"spacing": "leading", "drop_last": True}, [800, 600, 400, 200, -1]),
  ("discrete", "vp_discrete", {}, [999, 749, 499, 249, -1]),
  ("discrete", "vp_discrete", {"spacing": "linspace"}, [999, 666, 333, 0, -1]),
  ("discrete", "vp_discrete", {"spacing": "respaced"}, [999, 666, 333, 0, -1]),
  ("discrete", "vp_discrete", {"spacing": "linspace", "drop_last": True},
   [999, 749, 500, 250, -1]),
])
def test_grids(grid, path, options, expected):
  times = grids.make(grid, paths.PATHS[path](), 4, **options)
  assert times.dtype == np.float64
  np.testing.assert_allclose(times, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("variant", ["imagenet_dit_b4", "imagenet_dit_xl2"])
@pytest.mark.parametrize("steps", [250, 50, 10, 21])
def test_recipes_of_dit_take_its_steps(variant, steps):
  """space_timesteps(1000, "250") of facebookresearch/DiT diffusion/respace.py, told again."""
  options = importlib.import_module("configs.diffusion").get_config(variant).method.samples.sample
  assert options.steps == 250
  place, expected = 0.0, []
  while len(expected) < steps:  # Python's sum and round, as there
    expected.append(round(place))
    place += 999 / (steps - 1)
  times = grids.make(options.grid, paths.vp_discrete(), steps, **options.get("grid_options", {}))
  np.testing.assert_array_equal(times, [*expected[::-1], -1])
  if steps != 21:  # where sums stay off the halves it is the nearest integer to i 999 / (n - 1)
    exact = [(2 * 999 * i + steps - 1) // (2 * (steps - 1)) for i in range(steps)]
    np.testing.assert_array_equal(times[:-1], exact[::-1])


def test_shift_is_of_the_noise_level():
  t = np.linspace(0.1, 0.9, 9)
  shifted = grids.shift_times(t, 3.0)
  np.testing.assert_allclose(shifted / (1 - shifted), 3 * t / (1 - t))
  assert grids.dynamic_shift(256) == pytest.approx(np.exp(0.5))
  assert grids.dynamic_shift(4096) == pytest.approx(np.exp(1.15))


def test_noise_levels_of_times():
  path = paths.vp_discrete()
  sigma = np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1)
  np.testing.assert_allclose(grids.to_sigma(path, [999, 3, 0, -1]), [*sigma[[999, 3, 0]], 0])
  np.testing.assert_allclose(grids.to_sigma(path, [3.25], linear=True),
                             [0.75 * sigma[3] + 0.25 * sigma[4]])
  np.testing.assert_allclose(grids.to_sigma(path, [3.25]), [sigma[3]**0.75 * sigma[4]**0.25])


# --- Bad input ------------------------------------------------------------------------------------

def run(sampler="ddim", path="vp_discrete", times=(999.0, 500.0, -1.0), **options):
  def denoise(x, t):
    raise AssertionError("compiled before it was checked")
  return samplers.sample(denoise, jnp.zeros((3, 2)), times, paths.PATHS[path](), sampler, **options)


@pytest.mark.parametrize("message, call", [
  ("'dimm'.*did you mean 'ddim'", lambda: run("dimm")),
  ("at least one step", lambda: run(times=[999.0])),
  ("1000 is outside path 'vp_discrete'.*-1.*999", lambda: run(times=[1000.0, -1.0])),
  ("-2 is outside", lambda: run(times=[10.0, -2.0])),
  ("expected to fall", lambda: run(times=[10.0, 20.0])),
  ("outside", lambda: run(times=[np.nan, 0.0])),
  ("only the last", lambda: run(times=[10.0, -0.5, -1.0])),
  ("'euler' needs d alpha / dt.*'vp_discrete' lacks", lambda: run("euler")),
  ("'heun' needs", lambda: run("heun")),
  ("'euler_maruyama' needs", lambda: run("euler_maruyama", rng=jax.random.key(0))),
  ("path 'edm' only", lambda: run("edm")),
  ("either rng or noise", lambda: run("ddpm")),
  (r"noise of shape \(1,\)", lambda: run("ddpm", noise=np.zeros(1))),
  ("did you mean 'eta'", lambda: run(etta=1.0)),
  ("variance = 'smal'.*'small'", lambda: run("ddpm", rng=jax.random.key(0), variance="smal")),
  ("diffusion = 'sigm'", lambda: run("euler_maruyama", "gvp", [0.5, 0.1], diffusion="sigm")),
  ("solver = 'mid'", lambda: run("dpmpp_2m", solver="mid")),
  ("order = 4", lambda: run("dpmpp_2m", order=4)),
  ("order = 3", lambda: run("edm", "edm", [1.0, 0.0], order=3)),
  ("not finite at t = 500", lambda: run("dpm_2m")),
  ("not finite at t = 1", lambda: run("dpm_2m", "linear", [1.0, 0.5])),
  ("not finite", lambda: run("euler_maruyama", "linear", [1.0, 0.5], rng=jax.random.key(0))),
  ("the denoiser gives none", lambda: samplers.sample(
    lambda x, t: (x, x), jnp.zeros((3, 2)), [9.0, 8.0], paths.vp_discrete(), "ddpm",
    rng=jax.random.key(0), variance="learned")),
  ("targets", lambda: run(targets=np.array([5.0]))),
  ("grid = 'kerras'.*'karras'", lambda: grids.make("kerras", paths.edm(), 4)),
  ("did you mean 'rho'", lambda: grids.make("karras", paths.edm(), 4, roh=3.0)),
  ("steps = 0", lambda: grids.make("karras", paths.edm(), 0)),
  ("1001 steps.*1000", lambda: grids.make("discrete", paths.vp_discrete(), 1001)),
  ("has 0 to choose", lambda: grids.make("discrete", paths.gvp(), 4)),
  ("spacing = 'lead'.*'leading'", lambda: grids.make(
    "discrete", paths.vp_discrete(), 4, spacing="lead")),
  ("from inf", lambda: grids.make("karras", paths.linear(), 4)),
  ("grid 'shifted'", lambda: grids.make("shifted", paths.edm(), 4)),
  ("grid 'uniform': 2 is outside", lambda: grids.make("uniform", paths.linear(), 4, start=2.0)),
])
def test_bad_input(message, call):
  with pytest.raises(ValueError, match=message):
    call()
