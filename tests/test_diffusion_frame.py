"""Paths, predictions, objectives, guidance and ODE against closed forms for Gaussian data.

Where data is N(MU, S^2 I), x_t is N(alpha MU, alpha^2 S^2 + sigma^2) and everything is known.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from tiers import suite

from diffusion import guidance, objectives, ode, paths, predictions
from models import dit

MU, S, DATA = np.array([0.3, -0.5, 1.1]), 0.6, 0.5  # DATA: what EDM takes for S
CONTINUOUS = ("linear", "gvp", "vp_linear", "vp_cosine", "ve", "edm")
EVERY_PATH = pytest.mark.parametrize("name", [*CONTINUOUS, "vp_discrete"])
EVERY_PREDICTION = pytest.mark.parametrize("prediction", predictions.PREDICTIONS)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 1, shape)


def times(name):
  return np.array({"vp_discrete": [0, 1, 370, 999], "edm": [0.002, 0.3, 5, 80]}.get(
    name, [1e-4, 0.2, 0.63, 0.99]))


def alpha_sigma(name, t, dtype=np.float64):
  """The paths again, straight from the papers, with digits to spare."""
  t, half_pi = np.asarray(t, np.longdouble), 2 * np.arctan(np.longdouble(1))
  if name == "vp_discrete":
    beta = 1e-4 + np.arange(1000, dtype=np.longdouble) * (0.02 - 1e-4) / 999
    alpha = np.array([np.exp(np.log1p(-beta[:int(n) + 1]).sum() / 2) for n in t])
  else:
    s, integral = np.longdouble(0.008), 0.1 * t + (20 - 0.1) * t**2 / 2  # of beta(t)
    alpha = {"linear": 1 - t, "gvp": np.cos(half_pi * t), "vp_linear": np.exp(-integral / 2),
             "vp_cosine": np.cos((t + s) / (1 + s) * half_pi) / np.cos(s / (1 + s) * half_pi),
             }.get(name, np.ones_like(t))
  sigma = {"linear": t, "ve": 0.01 * 5000**t, "edm": t}.get(name, np.sqrt(1 - alpha**2))
  return alpha.astype(dtype), sigma.astype(dtype)


def derivatives(name, t):
  h = np.longdouble(1e-6) * t
  return [np.float64((above - below) / (2 * h)) for above, below in zip(
    alpha_sigma(name, t + h, np.longdouble), alpha_sigma(name, t - h, np.longdouble))]


def optimum(prediction, name, t, x):
  """What the best network says of x [b, ...] at t: (output, E[x_0 | x], E[eps | x])."""
  (alpha, sigma), s2 = alpha_sigma(name, t), S**2
  alpha, sigma = alpha[:, None], sigma[:, None]
  spread = alpha**2 * s2 + sigma**2
  score = -(x - alpha * MU) / spread
  x0, eps = (x + sigma**2 * score) / alpha, -sigma * score                   # Tweedie
  if prediction == "velocity":  # of x_t = alpha MU + sqrt(spread) z, where z stays
    d_alpha, d_sigma = (d[:, None] for d in derivatives(name, t))
    log_rate = (alpha * d_alpha * s2 + sigma * d_sigma) / spread
    return d_alpha * MU + log_rate * (x - alpha * MU), x0, eps
  noise = sigma / alpha
  edm = (x0 - DATA**2 / (noise**2 + DATA**2) * x / alpha) * np.sqrt(noise**2 + DATA**2) / (
    noise * DATA)
  return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": score,
          "edm": edm}[prediction], x0, eps


# --- Paths ----------------------------------------------------------------------------------------

@EVERY_PATH
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_paths(float64, name, kind):
  path, t = paths.PATHS[name](), times(name)
  alpha, sigma = alpha_sigma(name, t)
  assert path.t_data <= path.t_min <= t.min() and t.max() <= path.t_max + 1e-9
  assert isinstance(path.alpha(kind(t)), type(kind(t)))
  np.testing.assert_allclose(path.alpha(kind(t)), alpha, rtol=1e-9)
  np.testing.assert_allclose(path.sigma(kind(t)), sigma, rtol=1e-9)
  np.testing.assert_allclose(path.log_snr(kind(t)), 2 * np.log(alpha / sigma), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(path.inverse(path.log_snr(kind(t))), t, rtol=1e-8, atol=1e-10)
  np.testing.assert_allclose(path.sigma(kind(np.array([path.t_data]))),
                             0.01 if name == "ve" else 0, atol=1e-12)
  if path.d_alpha is not None:
    for d, expected in zip((path.d_alpha, path.d_sigma), derivatives(name, t)):
      np.testing.assert_allclose(d(kind(t)), expected, rtol=1e-6, atol=1e-9)


@EVERY_PATH
def test_paths_keep_their_digits_in_float32(name):
  path, t = paths.PATHS[name](), times(name)
  alpha, sigma = alpha_sigma(name, t)
  for f, expected in ((path.alpha, alpha), (path.sigma, sigma)):
    value = jax.jit(f)(jnp.asarray(t, jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=3e-6)
  log_snr = jnp.asarray(2 * np.log(alpha / sigma), jnp.float32)
  np.testing.assert_allclose(jax.jit(path.inverse)(log_snr), t, rtol=1e-4, atol=1e-8)


def test_discrete_path_between_its_steps():
  path = paths.vp_discrete(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
  np.testing.assert_allclose(path.alpha(np.arange(1000))**2,
                             np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)**2))
  t = np.array([0.25, 700.5])
  low, high = path.log_snr(np.floor(t)), path.log_snr(np.ceil(t))
  expected = low + (t - np.floor(t)) * (high - low)
  np.testing.assert_allclose(path.log_snr(t), expected)
  np.testing.assert_allclose(path.alpha(t)**2 / path.sigma(t)**2, np.exp(expected))
  np.testing.assert_allclose(path.alpha(t)**2 + path.sigma(t)**2, 1)
  np.testing.assert_allclose(jax.jit(path.sigma)(jnp.asarray(t)), path.sigma(t), rtol=1e-6)


def test_discrete_cosine_and_zero_terminal_snr():
  cosine = paths.vp_discrete(betas="cosine", steps=50)
  bar = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2)**2
  np.testing.assert_allclose(cosine.alpha(np.arange(49))**2, bar[1:50] / bar[0])
  np.testing.assert_allclose(cosine.alpha(np.array(49))**2, bar[49] / bar[0] * 1e-3)  # beta 0.999
  plain, zero = (paths.vp_discrete(steps=50, beta_end=0.3, zero_snr=z) for z in (False, True))
  before, after = plain.alpha(np.arange(50)), zero.alpha(np.arange(50))
  np.testing.assert_allclose(after[[0, -1]], [before[0], 0], atol=1e-12)
  slope = np.diff(after) / np.diff(before)  # an affine change of sqrt(alphas_cumprod)
  np.testing.assert_allclose(slope, slope[0])
  assert np.isneginf(zero.log_snr(np.array(49))) and np.isposinf(zero.log_snr(np.array(-1)))


@EVERY_PATH
def test_posterior(name):
  """Against conditioning the joint Gaussian of (x_s, x_t) given x_0."""
  path, t = paths.PATHS[name](), times(name)[1:]
  s = np.floor(t * 0.7) if name == "vp_discrete" else t * 0.7
  a, b, v, w = paths.posterior(path, t, s)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(name, t), alpha_sigma(name, s)
  covariance = alpha_t / alpha_s * sigma_s**2  # of x_s and x_t
  np.testing.assert_allclose(a, covariance / sigma_t**2, rtol=1e-9)
  np.testing.assert_allclose(a * alpha_t + b, alpha_s, rtol=1e-9)
  np.testing.assert_allclose(v, sigma_s**2 - covariance**2 / sigma_t**2, rtol=1e-6)
  np.testing.assert_allclose(w, sigma_t**2 - (alpha_t / alpha_s * sigma_s)**2, rtol=1e-9)


# --- Predictions ----------------------------------------------------------------------------------

@EVERY_PATH
@EVERY_PREDICTION
def test_conversions_agree_with_the_optimum(float64, name, prediction):
  path, t = paths.PATHS[name](), times(name)
  if prediction == "velocity" and path.d_alpha is None:
    with pytest.raises(ValueError, match="did you mean 'v'"):
      predictions.check(prediction, path)
    return
  x = jnp.asarray(normal(4, 3) * path.sigma(t)[:, None] + path.alpha(t)[:, None])
  output, x0, eps = optimum(prediction, name, t, x)
  tolerance = dict(rtol=1e-8, atol=1e-8)
  t = jnp.asarray(t)
  converted = predictions.to_x0_eps(prediction, output, x, path, t, DATA)
  np.testing.assert_allclose(converted[0], x0, **tolerance)
  np.testing.assert_allclose(converted[1], eps, **tolerance)
  back = predictions.from_x0_eps(prediction, x0, eps, path, t, DATA)
  np.testing.assert_allclose(back, output, **tolerance)


def test_preconditioning_is_table_1():
  t = np.array([0.002, 0.5, 80.0])
  skip, out, inside, noise = predictions.preconditioning(paths.edm(), t, DATA)
  np.testing.assert_allclose(skip, DATA**2 / (t**2 + DATA**2))
  np.testing.assert_allclose(out, t * DATA / np.sqrt(t**2 + DATA**2))
  np.testing.assert_allclose(inside, 1 / np.sqrt(t**2 + DATA**2))
  np.testing.assert_allclose(noise, np.log(t) / 4)


@EVERY_PATH
def test_denoiser_gives_an_edm_network_unit_inputs(float64, name):
  """c_in x has the variance 1 where data has sigma_data's, and x_0 = c_skip x + c_out F."""
  path, t = paths.PATHS[name](), times(name)[:, None] * np.ones((1, 500))
  x = np.sqrt((path.alpha(t) * DATA)**2 + path.sigma(t)**2) * normal(4, 500)
  seen = []
  def network(x, t):
    seen.append((x, t))
    return jnp.ones_like(x)
  t = jnp.asarray(times(name))
  x0, _, _ = predictions.denoiser(network, "edm", path, sigma_data=DATA)(jnp.asarray(x), t)
  np.testing.assert_allclose(seen[0][0], normal(4, 500), rtol=1e-9)
  np.testing.assert_allclose(seen[0][1], -np.asarray(path.log_snr(t)) / 8, rtol=1e-9)
  skip, out, *_ = (np.asarray(c)[:, None] for c in predictions.preconditioning(path, t, DATA))
  np.testing.assert_allclose(x0, skip * x / path.alpha(np.asarray(t))[:, None] + out, rtol=1e-7,
                             atol=1e-9)


@pytest.mark.parametrize("rederive", [False, True])
def test_denoiser_limits_x0(rederive):
  path, t = paths.gvp(), jnp.full(2, 0.5)
  x, output = jnp.full((2, 3, 1), 2.0), jnp.full((2, 3, 2), -1.0).at[..., 1].set(0.25)
  denoise = predictions.denoiser(lambda x, t: output, "eps", path, learned_variance=True,
                                 limit=lambda x: jnp.clip(x, -1, 1), rederive_eps=rederive)
  x0, eps, variance = denoise(x, 0.5)
  np.testing.assert_allclose(x0, 1)  # of 2 sqrt(2) + 1
  np.testing.assert_allclose(eps, 2 * 2**0.5 - 1 if rederive else -1, rtol=1e-6)
  np.testing.assert_allclose(variance, 0.25)
  np.testing.assert_allclose(path.alpha(t)[0] * x0 + path.sigma(t)[0] * eps,
                             2 if rederive else 0, atol=1e-6)


def test_threshold():
  x = (3 * normal(4, 5, 2)).astype(np.float32)
  x[3] /= 30  # all inside, so it stays
  expected = []
  for example in x:
    ordered, place = np.sort(np.abs(example).ravel()), 0.9 * 9
    low = int(place)
    size = ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])
    size = min(max(size, 1), 4)
    expected.append(np.minimum(np.maximum(example, -size), size) / size)
  np.testing.assert_allclose(predictions.threshold(jnp.asarray(x), 0.9, 4.0), expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ceiling": 1.5}, {"quantile": 0.9}], ids=str)
def test_threshold_is_dynamic_unless_held_down(options):
  """2205.11487 sec. 2.3 in float64: scaled back by the quantile, not clipped at 1."""
  x = np.random.default_rng(3).normal(0, 1, (4, 8, 8, 3)) * np.array([3, 1.2, 0.2, 40])[
    :, None, None, None]
  size = np.quantile(np.abs(x).reshape(4, -1), options.get("quantile", 0.995), axis=1)
  size = np.minimum(np.maximum(size, 1), options.get("ceiling", np.inf))
  assert (size > 1).sum() >= 3 and size[2] == 1
  size = size[:, None, None, None]
  expected = np.clip(x, -size, size) / size
  out = np.asarray(predictions.threshold(jnp.asarray(x, jnp.float32), **options))
  np.testing.assert_allclose(out, expected, atol=1e-6)
  assert np.abs(out - np.clip(x, -1, 1)).max() > 0.1


def test_sigma_frame_is_the_same_model(float64):
  path, t = paths.vp_linear(), np.array([0.1, 0.8])
  def denoise(x, t):
    _, x0, eps = optimum("x0", "vp_linear", np.asarray(t), np.asarray(x))
    return x0, eps
  x = jnp.asarray(normal(2, 3))
  framed, frame = predictions.sigma_frame(denoise, path)
  alpha, sigma = alpha_sigma("vp_linear", t)
  for a, b in zip(framed(x / alpha[:, None], jnp.asarray(sigma / alpha)), denoise(x, t)):
    np.testing.assert_allclose(a, b, rtol=1e-9)
  ends = alpha_sigma("vp_linear", np.array([path.t_min, path.t_max]))
  np.testing.assert_allclose([frame.t_min, frame.t_max], ends[1] / ends[0], rtol=1e-6)


# --- Objectives -----------------------------------------------------------------------------------

def error_of_x0(prediction, name, t):
  """What an error 1 of the prediction at a given x_t is of x_0: alpha e_x0 + sigma e_eps = 0."""
  alpha, sigma = alpha_sigma(name, t)
  d_alpha, d_sigma = derivatives(name, t) if name != "vp_discrete" else (None, None)
  return {"eps": -sigma / alpha, "x0": np.ones_like(t), "score": sigma**2 / alpha,
          "v": -sigma / (alpha**2 + sigma**2),
          "velocity": d_alpha is not None and 1 / (d_alpha - d_sigma * alpha / sigma),
          "edm": sigma / alpha * DATA / np.sqrt((sigma / alpha)**2 + DATA**2)}[prediction]


@EVERY_PATH
@EVERY_PREDICTION
@pytest.mark.parametrize("weighting", objectives.WEIGHTINGS)
def test_the_optimum_minimises_the_loss(float64, name, prediction, weighting):
  """Given x_t, data is N(m, s^2): two points at m +- s stand for it, as targets are linear in x_0.

  Off the minimum the loss grows by the square of the error, in units that the weighting names.
  """
  path, t = paths.PATHS[name](), times(name)[1:]
  if prediction == "velocity" and path.d_alpha is None:
    return
  alpha, sigma = alpha_sigma(name, t)
  x = normal(3, 3) + alpha[:, None]
  output, m, _ = optimum(prediction, name, t, x)
  s = (S * sigma / np.sqrt(alpha**2 * S**2 + sigma**2))[:, None]

  def loss(error):
    total = 0
    for x0 in (m + s, m - s):
      eps = (x - alpha[:, None] * x0) / sigma[:, None]
      total += objectives.loss(prediction, output + error, jnp.asarray(x0), jnp.asarray(eps), path,
                               jnp.asarray(t), weighting, gamma=2.0, sigma_data=DATA) / 2
    return total

  gradient = jax.grad(lambda e: loss(e).sum())(jnp.zeros((3, 3)))
  weight = np.asarray(loss(jnp.ones((3, 3))) - loss(jnp.zeros((3, 3))))
  assert (weight > 0).all()
  np.testing.assert_allclose(gradient / weight[:, None], 0, atol=1e-4)
  snr = (alpha / sigma)**2
  of_x0 = {"x0": np.ones(3), "snr": snr, "sigma2": snr, "min_snr": np.minimum(snr, 2),
           "edm": (sigma**2 / alpha**2 + DATA**2) / (sigma / alpha * DATA)**2}
  expected = np.ones(3) if weighting == "uniform" else (
    of_x0[weighting] * error_of_x0(prediction, name, t)**2)
  np.testing.assert_allclose(weight, expected, rtol=1e-4)


def test_weights_are_finite_where_no_signal_is_left():
  for weighting in ("snr", "min_snr", "sigma2", "uniform"):
    weight = objectives.weight(weighting, "eps", paths.linear(), jnp.ones(1))
    np.testing.assert_allclose(weight, 1)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name,path", [
  ("uniform", "linear"), ("uniform", "edm"), ("uniform", "vp_discrete"), ("logit_normal", "linear"),
  ("log_normal", "edm"), ("log_normal", "linear"), ("log_normal", "vp_linear")])
def test_times(name, path, stratified):
  """Their distribution function at them is uniform; stratified, one is in each of b intervals."""
  b, path = 4000, paths.PATHS[path]()
  options = {} if name == "uniform" else dict(mean=0.4, std=1.3)
  draw = jax.jit(lambda key: objectives.sample_times(key, b, path, name, stratified, **options))
  t = np.asarray(draw(jax.random.key(3)), np.float64)
  np.testing.assert_array_equal(t, draw(jax.random.key(3)))
  assert len(set(t)) > 900
  if (name, path.name) != ("log_normal", "edm"):  # which is not bounded
    assert (path.t_min <= t).all() and (t <= path.t_max).all()
  if path.steps:
    assert (t == np.floor(t)).all()
    u = (t + 0.5) / path.steps
    if stratified:
      assert (np.bincount(t.astype(int)) == b / path.steps).all()
  elif name == "uniform":
    u = (t - path.t_min) / (path.t_max - path.t_min)
  else:
    alpha, sigma = path.alpha(t), path.sigma(t)
    z = np.log(t / (1 - t)) if name == "logit_normal" else np.log(sigma / alpha)
    u = np.array([math.erfc((0.4 - z) / 1.3 / 2**0.5) / 2 for z in z])
  gap = np.abs(np.sort(u) - (np.arange(b) + 0.5) / b).max()
  if not stratified:
    assert 0.3 / b**0.5 < gap < 1.95 / b**0.5  # Kolmogorov and Smirnov's 99.9% point
  elif not path.steps:
    assert gap < 0.51 / b


@pytest.mark.parametrize("name", objectives.TIMES)
def test_times_stay_inside(name):
  edge = 2.0**-24
  for path in paths.PATHS:
    path = paths.PATHS[path]()
    if name == "uniform" or (not path.steps and path.t_max == 1):
      t = objectives.TIMES[name](path, jnp.array([edge, 1 - edge]))
      assert path.t_min <= t[0] < t[1] <= path.t_max, path.name


# --- The hybrid loss ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded():
  arrays = published.arrays("dit", "train")
  arrays = {name: published.nhwc(x) if x.ndim == 4 else x for name, x in arrays.items()}
  model = dit.make(image_size=8, channels=4, patch=2, width=48, depth=2, heads=4, num_classes=10,
                   learn_sigma=True, positions="learned")
  params, _ = published.to_ours("dit/original", published.load("dit"), dict(heads=4, patch=2))
  out = jax.jit(lambda *args: model.apply({"params": params}, *args))(
    arrays["x_t"], arrays["t"], arrays["y"])
  return {**arrays, "out": out}


def test_hybrid_loss_is_the_published(recorded):
  r, path = recorded, paths.vp_discrete()
  x_t = paths.noised(path, jnp.asarray(r["x0"]), jnp.asarray(r["noise"]), jnp.asarray(r["t"]))
  np.testing.assert_allclose(x_t, r["x_t"], atol=1e-6)
  args = jnp.asarray(r["x0"]), jnp.asarray(r["noise"]), x_t, path, jnp.asarray(r["t"])

  def terms(out, weight):
    return objectives.hybrid("eps", out, *args, vlb_weight=weight)

  np.testing.assert_allclose(terms(r["out"], 0.0), r["term_mse"], atol=1e-5)
  np.testing.assert_allclose(terms(r["out"], 1e-3), r["term_mse"] + r["term_vb"], atol=1e-5)
  gradient = jax.grad(lambda out: (terms(out, 1.0) - terms(out, 0.0)).sum())(r["out"])
  eps, variance = np.split(np.asarray(gradient), 2, axis=-1)
  assert (eps == 0).all() and (variance != 0).mean() > 0.9


@pytest.mark.parametrize("variance", [-1.0, 0.2])
def test_variational_bound_is_a_divergence(float64, variance):
  """By integrating q log q/p over x_(t-1), one pixel at a time."""
  path, t, v = paths.vp_discrete(steps=20, beta_end=0.3), np.array([1, 7, 19]), variance
  x0, guess, x_t = (0.5 * normal(3, 1, seed=s) for s in range(3))
  bound = objectives.variational_bound(jnp.asarray(guess), jnp.full((3, 1), v), jnp.asarray(x0),
                                       jnp.asarray(x_t), path, jnp.asarray(t))
  beta = np.linspace(1e-4, 0.3, 20)
  bar = np.append(1, np.cumprod(1 - beta))  # [t + 1] is time t
  for i, n in enumerate(t):
    before, after, b = bar[n], bar[n + 1], beta[n]
    small = b * (1 - before) / (1 - after)
    q, p = (((before**0.5 * b * x + (1 - b)**0.5 * (1 - before) * x_t[i, 0]) / (1 - after), s2)
            for x, s2 in ((x0[i, 0], small),
                          (guess[i, 0], b**((v + 1) / 2) * small**((1 - v) / 2))))
    x = q[0] + np.linspace(-9, 9, 20_001) * small**0.5
    log_q, log_p = (-(x - m)**2 / (2 * s2) - np.log(2 * np.pi * s2) / 2 for m, s2 in (q, p))
    expected = np.trapezoid(np.exp(log_q) * (log_q - log_p), x) / np.log(2)
    np.testing.assert_allclose(bound[i], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("guess", [-0.99, 0.1, 1.0])
def test_decoder_is_a_distribution_of_256_levels(float64, guess):
  level = jnp.linspace(-1, 1, 256)[:, None]
  def likelihood(published_cdf):
    bits = objectives.variational_bound(
      jnp.full_like(level, guess), jnp.full_like(level, 0.3), level, jnp.full_like(level, guess),
      paths.vp_discrete(), jnp.zeros(256, jnp.int32), published_cdf)
    return np.asarray(2.0 ** -bits)
  exact, tanh = likelihood(False), likelihood(True)
  np.testing.assert_allclose(exact.sum(), 1, atol=1e-8)
  assert abs(level[exact.argmax(), 0] - guess) < 1.01 / 255
  assert 0 < np.abs(exact - tanh).max() < 1e-3


# --- Guidance -------------------------------------------------------------------------------------

def network(x, t, label):  # conditions are trees, here of one array
  t, y = t[:, None, None], label["y"][:, None, None]
  return jnp.concatenate([jnp.sin(x + t), x**2], -1) * (1 + y)


X, T = jnp.asarray(normal(4, 5, 2), jnp.float32), jnp.array([0.1, 0.4, 0.6, 0.9])
LABEL, NULL = {"y": jnp.arange(4.0)}, {"y": jnp.full(4, -0.3)}


@pytest.mark.parametrize("channels", [None, 2, 3])
@pytest.mark.parametrize("interval", [None, (0.3, 0.7)])
@pytest.mark.parametrize("traced", [False, True])
def test_guidance(traced, interval, channels):
  def run(scale):
    return guidance.guided(network, LABEL, NULL, scale, interval, channels)(X, T)
  cond, null = (np.asarray(network(X, T, y)) for y in (LABEL, NULL))
  inside = np.ones(4, bool) if interval is None else (T > 0.3) & (T < 0.7)
  for scale in (0.0, 1.0, 2.5):
    out = np.asarray(jax.jit(run)(scale) if traced else run(scale))
    expected = {0: null, 1: cond}.get(scale, null + scale * (cond - null))
    expected = np.where(inside[:, None, None], expected, cond)
    if channels is not None and scale:
      expected[..., channels:] = cond[..., channels:]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    if scale in (0, 1) and not traced:
      np.testing.assert_array_equal(out, expected)
  by_example = jnp.array([0.0, 1.0, 2.5, 7.0])
  rows = [run(w)[i] for i, w in enumerate(by_example.tolist())]
  np.testing.assert_allclose(run(by_example), rows, atol=1e-5)


def test_guidance_0_and_1_are_bit_for_bit_when_traced():
  """With numbers of such sizes that null + 1 (cond - null) rounds."""
  def big(x, t, y):
    return x * jnp.where(y["y"] > 0, 1e6, 0.1)[:, None, None]
  label = {"y": jnp.ones(4)}
  run = jax.jit(lambda scale: guidance.guided(big, label, NULL, scale, channels=1)(X, T))
  np.testing.assert_array_equal(run(1.0), big(X, T, label))
  np.testing.assert_array_equal(run(0.0), big(X, T, NULL))


def test_guidance_calls_the_network_once_of_twice_the_batch():
  rows = []
  def count(x, t, y):
    rows.append((len(x), len(t), len(y["y"])))
    return x
  for scale in (2.0, 1.0, 0.0):
    guidance.guided(count, LABEL, NULL, scale)(X, T)
  assert rows == [(8, 8, 8), (4, 4, 4), (4, 4, 4)]


def test_guidance_on_eight_devices_is_that_on_one():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.NamedSharding(mesh, jax.P("data"))
  args = jnp.tile(X, (4, 1, 1)), jnp.tile(T, 4), {"y": jnp.arange(16.0)}
  run = jax.jit(lambda x, t, y: guidance.guided(
    network, y, {"y": jnp.full(16, -0.3)}, 2.5, (0.3, 0.7))(x, t))
  out = run(*jax.device_put(args, sharded))
  assert len(out.sharding.device_set) == 8 and not out.is_fully_replicated
  np.testing.assert_allclose(out, run(*args), atol=1e-5)


def test_guidance_of_the_published_dit():
  io = {name: published.nhwc(x) if x.ndim == 4 else x
        for name, x in published.arrays("dit").items()}
  b = len(io["cfg_x"]) // 2
  raw = jnp.asarray(io["cfg_raw"])  # [conditional | unconditional]
  def recorded(x, t, y):
    return jnp.stack([raw[:b], raw[b:]], 1).reshape(raw.shape) if len(x) == 2 * b else None
  out = guidance.guided(recorded, jnp.asarray(io["cfg_y"][:b]), jnp.asarray(io["cfg_y"][b:]),
                        float(io["cfg_scale"]), channels=3)(
    jnp.asarray(io["cfg_x"][:b]), jnp.asarray(io["cfg_t"][:b]))
  np.testing.assert_allclose(out, io["cfg_out"][:b], atol=1e-5)


# --- The probability-flow ODE ---------------------------------------------------------------------

COVARIANCE = np.array([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]])


def correlated(path):
  """The best denoiser of data N(MU, COVARIANCE), in its eigenbasis."""
  values, basis = (jnp.asarray(a) for a in np.linalg.eigh(COVARIANCE))
  def denoise(x, t):
    alpha, sigma = path.alpha(t), path.sigma(t)
    centred = (x - alpha * MU[None]) @ basis
    x0 = MU[None] + (centred * (alpha * values / (alpha**2 * values + sigma**2))[None]) @ basis.T
    return x0, (x - alpha * x0) / sigma
  return denoise


def ends(path):
  """Of the eigenvalues of x_t's covariance, at t_min and t_max; and alpha there."""
  values = np.linalg.eigvalsh(COVARIANCE)
  t = np.array([path.t_min, path.t_max])
  alpha, sigma = path.alpha(t), path.sigma(t)
  return alpha, alpha[:, None]**2 * values + sigma[:, None]**2


@pytest.mark.parametrize("name", suite(CONTINUOUS, 0, 3))
def test_adaptive_ode_is_the_exact_map(float64, name):
  path, basis = paths.PATHS[name](), np.linalg.eigh(COVARIANCE)[1]
  alpha, variance = ends(path)
  noise = normal(4, 3)
  first, last = (a * MU + (noise * np.sqrt(v)) @ basis.T for a, v in zip(alpha, variance))
  down = ode.adaptive(correlated(path), jnp.asarray(last), path, rtol=1e-8, atol=1e-8)
  np.testing.assert_allclose(down, first, atol=1e-5)
  up = ode.adaptive(correlated(path), jnp.asarray(first), path, path.t_min, path.t_max, rtol=1e-8,
                    atol=1e-8)
  np.testing.assert_allclose(up / last.std(), last / last.std(), atol=1e-5)


def exact_bits(path, x):
  """Of N(0, sigma_T^2 I) pushed through the exact map, which is linear."""
  basis = np.linalg.eigh(COVARIANCE)[1]
  alpha, variance = ends(path)
  ratio = variance[1] / variance[0]
  last = alpha[1] * MU + (((x - alpha[0] * MU) @ basis) * np.sqrt(ratio)) @ basis.T
  sigma = path.sigma(np.array(path.t_max))
  prior = (-(last / sigma)**2 / 2 - np.log(2 * np.pi * sigma**2) / 2).sum(1)
  return -(prior + np.log(ratio).sum() / 2) / 3 / np.log(2)


@pytest.mark.parametrize("name", suite(CONTINUOUS, 0, 3))
def test_bits_per_dim(float64, name):
  path = paths.PATHS[name]()
  x = MU + normal(5, 3) @ np.linalg.cholesky(COVARIANCE).T
  bits = ode.bits_per_dim(correlated(path), jnp.asarray(x), path, exact=True, rtol=1e-7, atol=1e-7)
  np.testing.assert_allclose(bits, exact_bits(path, x), atol=1e-4)
  centred = x - MU
  log_p = -(centred @ np.linalg.inv(COVARIANCE) * centred).sum(1) / 2 - np.linalg.slogdet(
    2 * np.pi * COVARIANCE)[1] / 2
  np.testing.assert_allclose(bits, -log_p / 3 / np.log(2), atol=0.02)  # noise is all but N(0, I)


def test_bits_per_dim_by_random_signs():
  path, x = paths.linear(), MU + 0.5 * normal(2, 3)
  args = correlated(path), jnp.asarray(x, jnp.float32), path
  bits = ode.bits_per_dim(*args, jax.random.key(0), probes=400, bin_width=2 / 256)
  one = ode.bits_per_dim(*args, jax.random.key(0))
  expected = exact_bits(path, x)
  assert np.abs(one - expected).max() > 1e-2  # a single estimate is not the trace
  np.testing.assert_allclose(bits, expected + 7, atol=0.03)
  with pytest.raises(ValueError, match="give rng, or exact=True"):
    ode.bits_per_dim(*args)


# --- Bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("message,call", [
  ("did you mean 'cosine'", lambda: paths.vp_discrete(betas="cosin")),
  ("at least 2 steps", lambda: paths.vp_discrete(steps=1)),
  ("0 < beta_start = 0.5 < beta_end = 0.02", lambda: paths.vp_discrete(beta_start=0.5)),
  ("at least one step", lambda: paths.check_times(paths.linear(), [0.5])),
  ("1.5 is outside path 'linear'", lambda: paths.check_times(paths.linear(), [1.5, 0.0])),
  ("nan is outside", lambda: paths.check_times(paths.linear(), [float("nan"), 0.0])),
  ("expected to fall", lambda: paths.check_times(paths.linear(), [0.2, 0.7, 0.0])),
  ("least noisy", lambda: paths.check_times(paths.edm(), [1.0, 0.001, 0.0])),
  ("did you mean 'velocity'", lambda: predictions.check("velocty", paths.linear())),
  ("meaning at t = 1", lambda: predictions.check("eps", paths.linear(), [1.0, 0.0])),
  ("meaning at t = 1", lambda: predictions.check("edm", paths.linear(), [1.0, 0.0])),
  ("did you mean 'min_snr'", lambda: objectives.weight("minsnr", "v", paths.gvp(), jnp.ones(1))),
  ("did you mean 'logit_normal'", lambda: objectives.sample_times(
    jax.random.key(0), 4, paths.linear(), "logitnormal")),
  ("times up to 80", lambda: objectives.sample_times(
    jax.random.key(0), 4, paths.edm(), "logit_normal")),
  ("integer times only", lambda: objectives.sample_times(
    jax.random.key(0), 4, paths.vp_discrete(), "log_normal")),
  ("needs path 'vp_discrete'", lambda: objectives.variational_bound(
    *[jnp.ones((1, 2))] * 4, paths.gvp(), jnp.zeros(1))),
  ("0 < sigma_min = 2 < sigma_max = 1", lambda: paths.ve(2, 1)),
  ("0 < sigma_min = 0 < sigma_max = 80", lambda: paths.edm(0)),
  ("0 < beta_min = 20 < beta_max = 0.1", lambda: paths.vp_linear(20, 0.1)),
  ("s = 0", lambda: paths.vp_cosine(0)),
  ("interval = \\(1, 0\\)", lambda: guidance.guided(network, LABEL, NULL, 2.0, (1, 0))),
  ("has no d alpha", lambda: ode.velocity(lambda x, t: (x, x), paths.vp_discrete())),
])
def test_bad_input(message, call):
  with pytest.raises(ValueError, match=message):
    call()
