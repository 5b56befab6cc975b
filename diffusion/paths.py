"""Paths from data to noise in one frame: x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I).

Noise grows with t on every path: at `t_data` x_t is the data, at `t_max` (nearly) noise. Functions
of t give NumPy for NumPy, in its precision (grids and tables, before compilation), else JAX.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

CLOSEST = 1e-5  # t_min of the paths on [0, 1], as 2011.13456 app. C trains them


class Path(NamedTuple):
  """A path's functions of time; those of a discrete one interpolate log-SNR between its steps."""

  name: str
  alpha: Callable  # t -> alpha_t
  sigma: Callable  # t -> sigma_t
  log_snr: Callable  # t -> log alpha_t^2 / sigma_t^2
  inverse: Callable  # log-SNR -> t
  d_alpha: Callable | None = None  # t -> d alpha / dt; None: the path has no velocity
  d_sigma: Callable | None = None  # t -> d sigma / dt
  t_data: float = 0.0  # where steps may end and no denoiser is called
  t_min: float = CLOSEST  # least noisy time at which a denoiser is trained and called
  t_max: float = 1.0  # noisiest time, where sampling starts
  steps: int = 0  # T, if times are the integers 0 .. T - 1


def lookup(table, name: str, field: str):
  """table[name]. Raises ValueError with the nearest name."""
  if name not in table:
    allowed = list(map(str, table))
    close = difflib.get_close_matches(str(name), allowed, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    raise ValueError(f"{field} = {name!r}: {hint}")
  return table[name]


def expand(coefficient, x):
  """A number, or one an example [b], so that it multiplies x [b, ...]."""
  coefficient = jnp.asarray(coefficient, x.dtype)
  return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1) * coefficient.ndim)


def noised(path: Path, x0, eps, t):
  """x_t = alpha_t x_0 + sigma_t eps: x0, eps [b, ...]; t [b] -> [b, ...]."""
  return expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * eps


def posterior(path: Path, t, s):
  """q(x_s | x_t, x_0) = N(a x_t + b x_0, v) and the variance w of q(x_t | x_s) that it inverts.

  2006.11239 eq. 6 and 7, for any path and s < t: there w is beta_t and v is beta~_t.
  Returns (a, b, v, w).
  """
  alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
  alpha_ts, ratio = alpha_t / alpha_s, sigma_s**2 / sigma_t**2
  w = sigma_t**2 - alpha_ts**2 * sigma_s**2
  return alpha_ts * ratio, alpha_s * w / sigma_t**2, w * ratio, w


def check_times(path: Path, times, field: str = "times") -> np.ndarray:
  """Times of a sampler [n + 1] as float64. Raises ValueError unless they fall inside the path."""
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"{field} of shape {times.shape}: expected at least one step, so two times")
  slack = 1e-6 * max(1, abs(path.t_max))
  wrong = (times < path.t_data - slack) | ~(times <= path.t_max + slack)
  if wrong.any():
    raise ValueError(f"{field}: {times[wrong][0]:g} is outside path {path.name!r}, whose times are "
                     f"{path.t_data:g} (data) to {path.t_max:g} (noise)")
  if (np.diff(times) > 0).any() or times[0] == times[-1]:
    raise ValueError(f"{field} = {times}: expected to fall, from noise to data")
  if (times[:-1] < path.t_min - slack).any():
    raise ValueError(f"{field}: only the last may be less than {path.t_min:g}, the least noisy "
                     f"time of path {path.name!r} that a model sees")
  return times


def _check_rising(**ends: float):
  """Raises ValueError unless 0 < the first < the second."""
  (low, a), (high, b) = ends.items()
  if not 0 < a < b:
    raise ValueError(f"expected 0 < {low} = {a} < {high} = {b}")


def _xp(t):
  return np if isinstance(t, (np.ndarray, np.generic, float, int)) else jnp


def _log_ratio(alpha, sigma):
  xp = _xp(alpha)
  with np.errstate(divide="ignore"):
    return 2 * (xp.log(alpha) - xp.log(sigma))


def _sigmoid(x):
  with np.errstate(over="ignore"):
    return 1 / (1 + _xp(x).exp(-x))


# --- Continuous paths -----------------------------------------------------------------------------

def linear() -> Path:
  """x_t = (1 - t) x_0 + t eps: rectified flow (2209.03003), flow matching (2210.02747 eq. 22).

  Data is at t = 0 here, as in 2401.08740 and 2403.03206; 2210.02747 runs its time the other way.
  """
  return Path(
    "linear", alpha=lambda t: 1 - t, sigma=lambda t: t * 1.0,
    d_alpha=lambda t: -_xp(t).ones_like(t * 1.0), d_sigma=lambda t: _xp(t).ones_like(t * 1.0),
    log_snr=lambda t: _log_ratio(1 - t, t * 1.0), inverse=lambda log_snr: _sigmoid(-log_snr / 2))


def gvp() -> Path:
  """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2): trigonometric, GVP in 2401.08740."""
  half = math.pi / 2

  def alpha(t):
    return _xp(t).sin(half * (1 - t))  # exactly 0 at t = 1, unlike the cosine

  def sigma(t):
    return _xp(t).sin(half * t)

  return Path(
    "gvp", alpha, sigma, log_snr=lambda t: _log_ratio(alpha(t), sigma(t)),
    inverse=lambda log_snr: _xp(log_snr).arctan(_xp(log_snr).exp(-log_snr / 2)) / half,
    d_alpha=lambda t: -half * sigma(t), d_sigma=lambda t: half * alpha(t))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
  """Variance preserving with beta(t) linear in t: the limit of DDPM (2011.13456 eq. 11, app. C)."""
  _check_rising(beta_min=beta_min, beta_max=beta_max)
  slope = beta_max - beta_min

  def log_alpha(t):
    return -(slope * t / 2 + beta_min) * t / 2

  def alpha(t):
    return _xp(t).exp(log_alpha(t))

  def sigma(t):
    return _xp(t).sqrt(-_xp(t).expm1(2 * log_alpha(t)))

  def d_alpha(t):
    return -alpha(t) * (beta_min + slope * t) / 2

  def inverse(log_snr):
    integral = _xp(log_snr).logaddexp(0.0, -log_snr)  # of beta, which is -2 log alpha
    return 2 * integral / (beta_min + _xp(log_snr).sqrt(beta_min**2 + 2 * slope * integral))

  return Path("vp_linear", alpha, sigma, lambda t: _log_ratio(alpha(t), sigma(t)), inverse,
              d_alpha, lambda t: -alpha(t) * d_alpha(t) / sigma(t))


def vp_cosine(s: float = 0.008) -> Path:
  """alpha_t = cos(a_t) / cos(a_0), a_t = pi/2 (t + s) / (1 + s) (2102.09672 eq. 17, continuous)."""
  if s <= 0:
    raise ValueError(f"s = {s}: expected more than 0")
  rate = math.pi / 2 / (1 + s)
  cos_0, sin_0 = math.cos(rate * s), math.sin(rate * s)

  def alpha(t):
    return _xp(t).sin(rate * (1 - t)) / cos_0

  def sigma(t):  # cos^2 a_0 - cos^2 a_t as a product, which keeps its digits near the data
    return _xp(t).sqrt(_xp(t).sin(rate * t) * _xp(t).sin(rate * (t + 2 * s))) / cos_0

  def d_alpha(t):
    return -rate * _xp(t).sin(rate * (t + s)) / cos_0

  def inverse(log_snr):
    xp = _xp(log_snr)
    cos2 = cos_0**2 * _sigmoid(log_snr)
    return xp.arctan2(xp.sqrt(sin_0**2 + cos_0**2 * _sigmoid(-log_snr)), xp.sqrt(cos2)) / rate - s

  return Path("vp_cosine", alpha, sigma, lambda t: _log_ratio(alpha(t), sigma(t)), inverse,
              d_alpha, lambda t: -alpha(t) * d_alpha(t) / sigma(t))


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
  """Variance exploding: alpha = 1, sigma_t geometric in t (2011.13456 eq. 9, app. C).

  Data is data with noise of sigma_min here: none has less.
  """
  _check_rising(sigma_min=sigma_min, sigma_max=sigma_max)
  log_ratio = math.log(sigma_max / sigma_min)

  def sigma(t):
    return sigma_min * _xp(t).exp(log_ratio * t)

  return Path(
    "ve", alpha=lambda t: _xp(t).ones_like(t * 1.0), sigma=sigma,
    log_snr=lambda t: -2 * (math.log(sigma_min) + log_ratio * t),
    inverse=lambda log_snr: (-log_snr / 2 - math.log(sigma_min)) / log_ratio,
    d_alpha=lambda t: _xp(t).zeros_like(t * 1.0), d_sigma=lambda t: log_ratio * sigma(t))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Path:
  """alpha = 1, sigma_t = t (2206.00364 table 1): time is the noise level, without a bound above.

  sigma_min and sigma_max are where samplers end and start.
  """
  _check_rising(sigma_min=sigma_min, sigma_max=sigma_max)
  return Path(
    "edm", alpha=lambda t: _xp(t).ones_like(t * 1.0), sigma=lambda t: t * 1.0,
    log_snr=lambda t: _log_ratio(_xp(t).ones_like(t * 1.0), t * 1.0),
    inverse=lambda log_snr: _xp(log_snr).exp(-log_snr / 2),
    d_alpha=lambda t: _xp(t).zeros_like(t * 1.0), d_sigma=lambda t: _xp(t).ones_like(t * 1.0),
    t_min=sigma_min, t_max=sigma_max)


# --- The discrete path of DDPM --------------------------------------------------------------------

def _scaled_linear_betas(beta_start, beta_end, steps):
  return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), steps)**2


def _cosine_betas(beta_start, beta_end, steps):
  alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2)**2
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {  # (beta_start, beta_end, steps) -> [steps]
  "linear": np.linspace,  # 2006.11239 sec. 4
  "scaled_linear": _scaled_linear_betas,  # 2112.10752
  "cosine": _cosine_betas,  # 2102.09672 eq. 17: without ends
}


def zero_terminal_snr(alphas_cumprod):
  """sqrt(alphas_cumprod) stretched: the last becomes 0, the first stays (2305.08891 alg. 1)."""
  root = np.sqrt(alphas_cumprod)
  return ((root - root[-1]) * root[0] / (root[0] - root[-1]))**2


def vp_discrete(betas: str = "linear", steps: int = 1000, beta_start: float = 1e-4,
                beta_end: float = 0.02, zero_snr: bool = False, floor: float = 0.0) -> Path:
  """DDPM's chain (2006.11239 eq. 4): alpha_t^2 = prod_{s <= t} (1 - beta_s), t = 0 .. steps - 1.

  Times are counted from 0, as published code does, so that data is at t = -1. `zero_snr`: see
  `zero_terminal_snr`. The betas "cosine" have no beta_start and beta_end. alpha_t^2 is at least
  `floor`: published code takes 2**-24 where sigma / alpha must stay finite in spite of `zero_snr`.
  """
  _check_rising(beta_start=beta_start, beta_end=beta_end)
  if steps < 2 or beta_end >= 1:
    raise ValueError(f"steps = {steps}, beta_end = {beta_end}: expected at least 2 steps and a "
                     "beta_end below 1")
  alphas_cumprod = np.cumprod(1 - lookup(BETAS, betas, "betas")(beta_start, beta_end, steps))
  if zero_snr:
    alphas_cumprod = zero_terminal_snr(alphas_cumprod)
  squares = np.append(1.0, np.maximum(alphas_cumprod, floor))  # of alpha at times -1 .. steps - 1
  with np.errstate(divide="ignore"):
    log_snrs = np.log(squares) - np.log1p(-squares)

  def at(t, table, between=lambda log_snr: log_snr):
    """table at whole times, exactly; elsewhere what follows from the log-SNR."""
    xp = _xp(t)
    place = xp.clip(xp.asarray(t) + 1.0, 0, steps)
    low, high = (f(place).astype(int) for f in (xp.floor, xp.ceil))
    share, known = place - low, xp.asarray(log_snrs)
    with np.errstate(invalid="ignore"):
      log_snr = (1 - share) * known[low] + share * known[high]
    return xp.where(share == 0, xp.asarray(table)[low], between(log_snr))

  def inverse(log_snr):
    xp = _xp(log_snr)
    return xp.interp(-log_snr, xp.asarray(-log_snrs[1:]), xp.arange(float(steps)))

  return Path(
    "vp_discrete", alpha=lambda t: at(t, np.sqrt(squares), lambda l: _sigmoid(l) ** 0.5),
    sigma=lambda t: at(t, np.sqrt(1 - squares), lambda l: _sigmoid(-l) ** 0.5),
    log_snr=lambda t: at(t, log_snrs), inverse=inverse,
    t_data=-1.0, t_min=0.0, t_max=steps - 1.0, steps=steps)


PATHS = {"linear": linear, "gvp": gvp, "vp_linear": vp_linear, "vp_cosine": vp_cosine,
         "vp_discrete": vp_discrete, "ve": ve, "edm": edm}
