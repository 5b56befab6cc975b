"""What a network predicts, and what that says of x_0 and eps.

Every prediction is P x_0 + Q eps with P, Q known at t. Beside x_t = alpha x_0 + sigma eps that is
two equations with two unknowns, so two formulas convert between all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion.paths import Path, check_times, edm, expand, lookup


class Denoised(NamedTuple):
  """What a denoiser says at (x_t, t), each like x_t."""

  x0: jnp.ndarray
  eps: jnp.ndarray
  variance: jnp.ndarray | None = None  # learned, in [-1, 1] between the posterior's two bounds


def _norm(alpha, sigma, sigma_data):
  return (sigma**2 + sigma_data**2 * alpha**2) ** 0.5


PREDICTIONS = {  # (path, t, sigma_data) -> P, Q
  "eps": lambda path, t, d: (0.0, 1.0),
  "x0": lambda path, t, d: (1.0, 0.0),
  "v": lambda path, t, d: (-path.sigma(t), path.alpha(t)),  # 2202.00512 sec. 4
  "velocity": lambda path, t, d: (path.d_alpha(t), path.d_sigma(t)),  # d x_t / dt
  "score": lambda path, t, d: (0.0, -1 / path.sigma(t)),  # grad log p_t(x_t), 2011.13456 eq. 7
  # F of EDM's x_0 = c_skip x + c_out F, see `preconditioning`.
  "edm": lambda path, t, d: (
    path.sigma(t) / d / _norm(path.alpha(t), path.sigma(t), d),
    -d * path.alpha(t) / _norm(path.alpha(t), path.sigma(t), d)),
}


def row(prediction: str, path: Path, t, sigma_data: float = 0.5):
  """(P, Q, determinant of [[alpha, sigma], [P, Q]]) of a prediction at t."""
  P, Q = lookup(PREDICTIONS, prediction, "prediction")(path, t, sigma_data)
  return P, Q, path.alpha(t) * Q - path.sigma(t) * P


def to_x0_eps(prediction: str, output, x, path: Path, t, sigma_data: float = 0.5):
  """A network's output at (x_t, t) as (x_0, eps): output and x [b, ...], t [b] or a number.

  `sigma_data` is the standard deviation of the data, for "edm".
  """
  P, Q, det = row(prediction, path, t, sigma_data)
  output = output.astype(x.dtype)
  x0 = expand(Q / det, x) * x - expand(path.sigma(t) / det, x) * output
  return x0, expand(path.alpha(t) / det, x) * output - expand(P / det, x) * x


def from_x0_eps(prediction: str, x0, eps, path: Path, t, sigma_data: float = 0.5):
  """The output P x_0 + Q eps that stands for (x_0, eps) at t: also the training target."""
  P, Q, _ = row(prediction, path, t, sigma_data)
  return expand(P, x0) * x0 + expand(Q, x0) * eps


def preconditioning(path: Path, t, sigma_data: float = 0.5):
  """c_skip, c_out, c_in, c_noise of 2206.00364 table 1, at x / alpha and sigma / alpha.

  x_0 = c_skip x + c_out F(c_in x; c_noise), which is what `to_x0_eps("edm", F, ...)` computes.
  """
  sigma = path.sigma(t) / path.alpha(t)
  norm = _norm(1.0, sigma, sigma_data)
  return sigma_data**2 / norm**2, sigma * sigma_data / norm, 1 / norm, -path.log_snr(t) / 8


def network_inputs(prediction: str, x, path: Path, t, sigma_data: float = 0.5):
  """What a network is given for (x_t, t): (c_in x / alpha, c_noise) for "edm", else as they are."""
  if prediction != "edm":
    return x, t
  *_, c_noise = preconditioning(path, t, sigma_data)
  return x / expand(_norm(path.alpha(t), path.sigma(t), sigma_data), x), c_noise


def check(prediction: str, path: Path, times=None):
  """Raises ValueError where a prediction, or it at a sampler's times [n + 1], has no meaning."""
  lookup(PREDICTIONS, prediction, "prediction")
  if prediction == "velocity" and path.d_alpha is None:
    raise ValueError(f"prediction = 'velocity': path {path.name!r} has no derivatives; did you "
                     "mean 'v'?")
  if times is not None:
    times = check_times(path, times)
    blind = times[:-1][path.alpha(times[:-1]) == 0]
    if prediction in ("eps", "score", "edm") and len(blind):
      raise ValueError(f"prediction = {prediction!r} has no meaning at t = {blind[0]:g}, where "
                       f"alpha is 0 on path {path.name!r}: start lower, or predict another")


def denoiser(network: Callable, prediction: str, path: Path, *, sigma_data: float = 0.5,
             limit: Callable | None = None, rederive_eps: bool = False,
             learned_variance: bool = False) -> Callable:
  """`denoise(x, t) -> Denoised` for samplers, of `network(x [b, ...], t [b]) -> output`.

  Args:
    network: gets `network_inputs`.
    prediction: a name in `PREDICTIONS`.
    path: on which it was trained.
    sigma_data: standard deviation of the data, for "edm".
    limit: x_0 -> x_0, such as `jnp.clip` to [-1, 1] or `threshold`.
    rederive_eps: make eps agree with the limited x_0 (2006.11239's and DiT's code); else it stays
      as predicted (2010.02502's).
    learned_variance: the output has twice the channels, the second half being the variance's.
  """
  check(prediction, path)

  def denoise(x, t):
    t = jnp.broadcast_to(t, x.shape[:1])
    output, variance = network(*network_inputs(prediction, x, path, t, sigma_data)), None
    if learned_variance:
      output, variance = jnp.split(output, 2, axis=-1)
      variance = variance.astype(x.dtype)
    x0, eps = to_x0_eps(prediction, output, x, path, t, sigma_data)
    if limit is not None:
      x0 = limit(x0)
      if rederive_eps:
        _, eps = to_x0_eps("x0", x0, x, path, t)
    return Denoised(x0, eps, variance)

  return denoise


def threshold(x0, quantile: float = 0.995, ceiling: float = math.inf):
  """Dynamic thresholding (2205.11487 sec. 2.3): clip to an example's quantile of |x_0|, scale back.

  Args:
    x0: [b, ...], of data in [-1, 1].
    quantile: share of an example's |x_0| that stays unclipped, where that reaches above 1.
    ceiling: most that the quantile may count for, at least 1. The paper has none; at 1, the default
      of published code, this is plain clipping to [-1, 1].
  """
  if not 0 <= quantile <= 1 or not ceiling >= 1:
    raise ValueError(f"threshold: quantile = {quantile}, ceiling = {ceiling}: expected a quantile "
                     "in [0, 1] and a ceiling of at least 1")
  size = jnp.quantile(jnp.abs(x0.reshape(len(x0), -1)), quantile, axis=1)
  size = expand(jnp.clip(size, 1.0, ceiling), x0)
  return jnp.clip(x0, -size, size) / size


def sigma_frame(denoise: Callable, path: Path) -> tuple[Callable, Path]:
  """The same model in EDM's frame: x_t / alpha_t on path "edm", with time sigma_t / alpha_t.

  x_0 and eps stay what they are. k-diffusion's samplers live here: with it `euler`, `heun`, `edm`
  and adaptive solvers run on models that were trained on a discrete path.
  """
  ends = path.log_snr(np.array([path.t_min, path.t_max]))

  def in_sigma(x, sigma):
    t = path.inverse(-2 * jnp.log(jnp.broadcast_to(sigma, x.shape[:1])))
    return denoise(expand(path.alpha(t), x) * x, t)

  return in_sigma, edm(*(float(sigma) for sigma in np.exp(-ends / 2)))
