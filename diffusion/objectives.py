"""Training: at which times, towards what, and how much each counts. Losses are per example, [b]."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.paths import Path, lookup, posterior
from diffusion.predictions import from_x0_eps, row, to_x0_eps

# --- Times ----------------------------------------------------------------------------------------
# As quantile functions of u in (0, 1): the same ones serve independent and stratified draws.


def uniform(path: Path, u):
  """Equally likely between t_min and t_max, or among the T integers of a discrete path (int32)."""
  if path.steps:
    return jnp.minimum(u * path.steps, path.steps - 1).astype(jnp.int32)
  return path.t_min + u * (path.t_max - path.t_min)


def logit_normal(path: Path, u, mean: float = 0.0, std: float = 1.0):
  """logit(t) ~ N(mean, std^2) (2403.03206 eq. 19), on paths with times in [0, 1]."""
  if path.t_max != 1:
    raise ValueError(f"times = 'logit_normal': path {path.name!r} has times up to {path.t_max:g}, "
                     "not 1")
  return jnp.clip(jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u)), path.t_min, 1)


def log_normal(path: Path, u, mean: float = -1.2, std: float = 1.2):
  """log(sigma_t / alpha_t) ~ N(mean, std^2) (2206.00364 table 1), on continuous paths."""
  if path.steps:
    raise ValueError(f"times = 'log_normal': path {path.name!r} has integer times only")
  t = path.inverse(-2 * (mean + std * jax.scipy.special.ndtri(u)))
  return t if path.name == "edm" else jnp.clip(t, path.t_min, path.t_max)  # edm has no bounds


TIMES = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def sample_times(rng, b: int, path: Path, times: str = "uniform", stratified: bool = False,
                 **options):
  """Training times [b]; `options` are those of a function in `TIMES`.

  Stratified, one falls in each of b equally likely intervals, in order (2107.00630 app. I.1), so
  that every batch covers all noise levels.
  """
  u = jax.random.uniform(rng, (b,))
  if stratified:
    u = (jnp.arange(b) + u) / b
  edge = jnp.finfo(u.dtype).eps / 2  # rounding may reach 0 and 1
  return lookup(TIMES, times, "times")(path, jnp.clip(u, edge, 1 - edge), **options)


# --- Weights --------------------------------------------------------------------------------------
# Of the squared error of x_0, as functions of the signal-to-noise ratio alpha^2 / sigma^2.

WEIGHTINGS = {
  "uniform": None,  # 1 on the prediction's own squared error
  "x0": lambda snr, gamma, d: jnp.ones_like(snr),
  "snr": lambda snr, gamma, d: snr,  # DDPM's L_simple: uniform on eps
  "sigma2": lambda snr, gamma, d: snr,  # sigma^2 on the score's error (2011.13456 eq. 7): the same
  "min_snr": lambda snr, gamma, d: jnp.minimum(snr, gamma),  # 2303.09556 sec. 3.4
  "edm": lambda snr, gamma, d: snr + 1 / d**2,  # 2206.00364 table 1: uniform on F
}


def weight(weighting: str, prediction: str, path: Path, t, gamma: float = 5.0,
           sigma_data: float = 0.5):
  """The factor [b] on the prediction's own mean squared error that a weighting stands for.

  An error e of the prediction at (x_t, t) is one of sigma / det times e of x_0 (`predictions.row`).
  """
  function = lookup(WEIGHTINGS, weighting, "weighting")
  if function is None:
    return jnp.ones(jnp.shape(t))
  # Where alpha is 0, weights of eps are limits: a floor whose square is a float32 finds them.
  path = path._replace(alpha=lambda t, alpha=path.alpha: jnp.maximum(alpha(t), 1e-12))
  *_, det = row(prediction, path, t, sigma_data)
  alpha, sigma = path.alpha(t), path.sigma(t)
  return function((alpha / sigma)**2, gamma, sigma_data) * (sigma / det) ** 2


# --- Losses ---------------------------------------------------------------------------------------

def _mean(x):
  return x.reshape(len(x), -1).mean(1)


def loss(prediction: str, output, x0, eps, path: Path, t, weighting: str = "uniform",
         gamma: float = 5.0, sigma_data: float = 0.5):
  """Weighted mean squared error of a network's output at x_t = alpha x_0 + sigma eps: [b], float32.

  output, x0, eps [b, ...]; t [b]. `gamma` is min-SNR's, `sigma_data` EDM's.
  """
  target = from_x0_eps(prediction, x0, eps, path, t, sigma_data)
  error = _mean(jnp.square(output.astype(target.dtype) - target))
  return weight(weighting, prediction, path, t, gamma, sigma_data) * error


def variational_bound(x0_hat, variance, x0, x_t, path: Path, t, published_cdf: bool = True):
  """L_t of 2006.11239 eq. 5 for one t an example, in bits a dimension: [b].

  For t > 0 KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)), at 0 -log p(x_0 | x_1) of pixels in
  [-1, 1] with 256 levels (eq. 13).

  Args:
    x0_hat: the predicted x_0 [b, ...], whose posterior mean is the model's.
    variance: like it, 1 for log beta_t and -1 for log beta~_t (2102.09672 eq. 15).
    x0, x_t, t: data, noised data and integer times [b] on a discrete path.
    path: a discrete one.
    published_cdf: the normal's distribution function by the published code's tanh formula, which is
      off by up to 2e-4; else the exact one.
  """
  if not path.steps:
    raise ValueError(f"the variational bound needs path 'vp_discrete', not {path.name!r}")
  steps = np.arange(path.steps)
  a, b, small, large = posterior(path, steps, steps - 1)
  small[0] = small[min(1, path.steps - 1)]  # 0 at the first step, so the second stands in

  def at(table):
    return jnp.asarray(table, x_t.dtype)[t].reshape(-1, *(1,) * (x_t.ndim - 1))

  share = (variance.astype(x_t.dtype) + 1) / 2
  log_variance = share * at(np.log(large)) + (1 - share) * at(np.log(small))  # eq. 15
  mean = at(a) * x_t + at(b) * x0_hat
  gap = at(b) * (x0 - x0_hat)  # of the two means
  kl = 0.5 * (log_variance - at(np.log(small)) - 1
              + (at(small) + gap**2) * jnp.exp(-log_variance))
  std = jnp.exp(log_variance / 2)
  cdf = _tanh_cdf if published_cdf else jax.scipy.stats.norm.cdf
  upper = jnp.where(x0 > 0.999, 1, cdf((x0 + 1 / 255 - mean) / std))
  lower = jnp.where(x0 < -0.999, 0, cdf((x0 - 1 / 255 - mean) / std))
  nll = -jnp.log(jnp.maximum(upper - lower, 1e-12))
  return jnp.where(t == 0, _mean(nll), _mean(kl)) / np.log(2)


def _tanh_cdf(x):
  return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def hybrid(prediction: str, output, x0, eps, x_t, path: Path, t, vlb_weight: float = 1e-3,
           published_cdf: bool = True, **weighting):
  """L_simple + vlb_weight T L_t (2102.09672 eq. 16) of an output with twice the channels: [b].

  The second half is the variance's; only it has a gradient from L_t. `weighting`: as of `loss`.
  """
  output, variance = jnp.split(output, 2, axis=-1)
  simple = loss(prediction, output, x0, eps, path, t, **weighting)
  x0_hat, _ = to_x0_eps(prediction, jax.lax.stop_gradient(output), x_t, path, t,
                        weighting.get("sigma_data", 0.5))
  bound = variational_bound(x0_hat, variance, x0, x_t, path, t, published_cdf)
  return simple + vlb_weight * path.steps * bound
