"""Samplers as tables: every step is a sum of known multiples of x_t, x_0, eps and noise.

A sampler says at which times the denoiser is called and, after each call, what the next x is. All
its coefficients follow from alpha and sigma at those times, so they are NumPy in float64, made
before anything is compiled, and one `lax.scan` runs them all. In the tables' functions a step leads
from t to s, t > s, both [n]; a term "x0_1" is the x_0 of the call before.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.paths import Path, check_times, lookup, posterior

PAST = {"x_1": "x", "x0_1": "x0", "x0_2": "x0_1", "eps_1": "eps", "eps_2": "eps_1"}


class Table(NamedTuple):
  t: np.ndarray  # [calls] times at which the denoiser is called
  terms: dict  # name -> [calls]; the next x is the sum of terms times what they name


# --- One call a step ------------------------------------------------------------------------------

def ddpm(path: Path, t, s, variance: str = "small") -> Table:
  """Ancestral: x_s ~ q(x_s | x_t, x_0) (2006.11239 alg. 2), without noise where sigma_s is 0.

  variance: "small" (beta~), "large" (beta) or "learned" between them (2102.09672 eq. 15), for
  which the denoiser gives Denoised.variance.
  """
  a, b, small, large = posterior(path, t, s)
  noise = (path.sigma(s) > 0) * 1.0
  terms = lookup({
    "small": {"noise": noise * np.sqrt(small)}, "large": {"noise": noise * np.sqrt(large)},
    "learned": {"noise": noise, "log_small": np.log(np.maximum(small, 1e-20)),
                "log_large": np.log(large)}}, variance, "variance")
  return Table(t, {"x": a, "x0": b, **terms})


def ddim(path: Path, t, s, eta: float = 0.0) -> Table:
  """x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z with c = eta sqrt(beta~).

  2010.02502 eq. 12 and 16: eta 0 is deterministic, 1 ancestral. In EDM's frame it is Euler, or
  Euler ancestral, in sigma.
  """
  c = eta * np.sqrt(posterior(path, t, s)[2])
  terms = {"x0": path.alpha(s), "eps": np.sqrt(np.maximum(path.sigma(s)**2 - c**2, 0))}
  return Table(t, {**terms, "noise": c} if eta else terms)


def euler(path: Path, t, s) -> Table:
  """x_s = x_t + (s - t) dx/dt on the probability-flow ODE, dx/dt = alpha' x_0 + sigma' eps."""
  d_alpha, d_sigma = _derivatives(path, t, "euler")
  return Table(t, {"x": np.ones_like(t), "x0": (s - t) * d_alpha, "eps": (s - t) * d_sigma})


DIFFUSIONS = {  # (path, t) -> w_t, the squared diffusion of the reverse SDE
  "forward": lambda path, t: 2 * path.sigma(t) * (
    path.d_sigma(t) - path.d_alpha(t) / path.alpha(t) * path.sigma(t)),  # g(t)^2 of 2011.13456
  "sigma": lambda path, t: path.sigma(t),
  "constant": lambda path, t: np.ones_like(t),
}


def euler_maruyama(path: Path, t, s, diffusion: str | Callable = "forward", scale: float = 1.0,
                   last_noise: bool = False) -> Table:
  """dx = (v - w/2 score) dt + sqrt(w) dW backwards in time, v the ODE's dx/dt (2401.08740 sec. 2).

  Marginals are the path's for any w >= 0: `scale` times a name in DIFFUSIONS or (path, t) -> w.
  `last_noise` False leaves the last step's noise out, as published samplers do.
  """
  d_alpha, d_sigma = _derivatives(path, t, "euler_maruyama")
  w = scale * (diffusion if callable(diffusion) else lookup(DIFFUSIONS, diffusion, "diffusion"))(
    path, t)
  noise = np.sqrt(w * (t - s))
  if not last_noise:
    noise[-1] = 0
  return Table(t, {"x": np.ones_like(t), "x0": (s - t) * d_alpha,
                   "eps": (s - t) * (d_sigma + w / 2 / path.sigma(t)), "noise": noise})


def dpm(path: Path, t, s, order: int = 2, of: str = "x0", sde: bool = False,
        solver: str = "midpoint", lower_order_final: bool = True, euler_at_final: bool = False,
        full_third: bool = False) -> Table:
  """DPM-Solver, multistep: Taylor steps in lambda = log(alpha / sigma) of x_0 or eps.

  2211.01095 alg. 2 ("++") for x_0 and 2206.00927 for eps: the same formulas with alpha and sigma
  exchanged and lambda negated. Differences of earlier calls stand for derivatives.

  Args:
    path, t, s: steps.
    order: 1 (DDIM), 2 or 3. The first steps have what calls there are; the step to sigma = 0 has 1.
    of: "x0" or "eps".
    sde: the reverse SDE rather than the ODE, of x_0 (SDE-DPM-Solver++ of 2211.01095).
    solver: how order 2 weighs its difference, "midpoint" (as alg. 2) or "heun" (exactly).
    lower_order_final: of fewer than 15 steps, the last has order 1 and the one before at most 2.
    euler_at_final: the last step has order 1 however many there are.
    full_third: order 3 with all of its second difference; the published code takes half of it,
      which converges at order 2.
  """
  if order not in (1, 2, 3) or (sde and (order == 3 or of == "eps")):
    raise ValueError(f"order = {order}, of = {of!r}, sde = {sde}: expected order 1, 2 or 3, and "
                     "for the SDE at most 2, of 'x0'")
  alpha, sigma, sign = lookup({"x0": (path.alpha, path.sigma, 1), "eps": (
    path.sigma, path.alpha, -1)}, of, "of")
  lam, lam_s = path.log_snr(t) / 2, path.log_snr(s) / 2
  n, h = len(t), sign * (lam_s - lam)
  orders = np.minimum(np.arange(1, n + 1), order)
  if lower_order_final and n < 15:
    orders = np.minimum(orders, n - np.arange(n))
  if euler_at_final or path.sigma(s[-1]) == 0:
    orders[-1] = 1
  orders[h == 0] = 1
  step = np.append(np.nan, sign * np.diff(lam))
  r0, r1 = step / h, np.append(np.nan, step[:-1]) / h
  k = 2 * h if sde else h
  phi_1 = -np.expm1(-k)
  phi_2, phi_3 = 1 - phi_1 / k, (0.5 - (k - phi_1) / k**2) * (2 if full_third else 1)
  first = lookup({"midpoint": phi_1 / 2, "heun": phi_2}, solver, "solver")  # of (m_0 - m_1) / r_0
  first = np.where(orders > 2, phi_2 * (1 + r0 / (r0 + r1)) + phi_3 / (r0 + r1), first)
  second = -(phi_2 * r0 + phi_3) / (r0 + r1)  # of (m_1 - m_2) / r_1
  first = np.where(orders > 1, first / r0, 0)
  second = np.where(orders > 2, second / r1, 0)
  terms = {"x": sigma(s) / sigma(t), of: alpha(s) * (phi_1 + first),
           f"{of}_1": alpha(s) * (second - first), f"{of}_2": -alpha(s) * second}
  if sde:
    terms.update(x=terms["x"] * np.exp(-h), noise=sigma(s) * np.sqrt(phi_1))
  return Table(t, {name: c for name, c in terms.items() if np.any(c)})


# --- Two calls a step, the second of them nowhere where sigma is 0 --------------------------------

def heun(path: Path, t, s) -> Table:
  """Euler's step, then the mean of dx/dt at both its ends (2206.00364 alg. 1, on any path)."""
  d_alpha, d_sigma = _derivatives(path, t, "heun")
  next_alpha, next_sigma = _derivatives(path, s, "heun")
  dt = s - t
  second = {"x_1": np.ones_like(t), "x0_1": dt / 2 * d_alpha, "eps_1": dt / 2 * d_sigma,
            "x0": dt / 2 * next_alpha, "eps": dt / 2 * next_sigma}
  return _interleave(path, t, s, euler(path, t, s).terms, s, second)


def edm(path: Path, t, s, order: int = 2, churn: float = 0.0, s_min: float = 0.0,
        s_max: float = np.inf, s_noise: float = 1.0) -> Table:
  """EDM's stochastic sampler (2206.00364 alg. 2): raise the noise from t to t^, then step to s.

  order 2 is Heun's step, 1 Euler's; churn, s_min, s_max and s_noise are alg. 2's S.
  """
  if path.name != "edm":
    raise ValueError(f"sampler 'edm' adds noise on path 'edm' only, not {path.name!r}: see "
                     "predictions.sigma_frame")
  step = lookup({1: euler, 2: heun}, order, "order")
  gamma = np.where((t >= s_min) & (t <= s_max), min(churn / len(t), 2**0.5 - 1), 0)
  raised = t * (1 + gamma)
  calls, terms = step(path, raised, s)
  if churn:
    terms["churn"] = np.zeros(len(calls))
    terms["churn"][::order] = s_noise * np.sqrt(raised**2 - t**2)  # before a step's first call
  return Table(calls, terms)


def dpm_2s(path: Path, t, s) -> Table:
  """DPM-Solver++(2S) (2211.01095 alg. 1, r = 1/2): through the middle of the step in lambda."""
  lam, lam_s = path.log_snr(t) / 2, path.log_snr(s) / 2
  middle = np.where(path.sigma(s) > 0, path.inverse(lam + lam_s), s)
  h = lam_s - lam
  first = {"x": path.sigma(middle) / path.sigma(t), "x0": -path.alpha(middle) * np.expm1(
    -np.where(path.sigma(s) > 0, h / 2, h))}
  second = {"x_1": path.sigma(s) / path.sigma(t), "x0": -path.alpha(s) * np.expm1(-h)}
  return _interleave(path, t, s, first, middle, second)


def _derivatives(path, t, sampler):
  if path.d_alpha is None:
    raise ValueError(f"sampler {sampler!r} needs d alpha / dt, which path {path.name!r} lacks: use "
                     "predictions.sigma_frame, or 'ddim'")
  return path.d_alpha(t), path.d_sigma(t)


def _interleave(path, t, s, first, between, second) -> Table:
  """Rows of first and second calls in turn, but only the first where a step ends at sigma = 0."""
  keep = np.stack([np.ones(len(t), bool), path.sigma(s) > 0], axis=1).ravel()
  zero = np.zeros(len(t))
  def rows(a, b):
    return np.stack([a, b], axis=1).ravel()[keep]
  return Table(rows(t, between), {name: rows(first.get(name, zero), second.get(name, zero))
                                  for name in {**first, **second}})


SAMPLERS = {
  "ddpm": ddpm,
  "ddim": ddim,
  "euler": euler,
  "euler_ancestral": functools.partial(ddim, eta=1.0),  # as k-diffusion calls it in EDM's frame
  "euler_maruyama": euler_maruyama,
  "heun": heun,
  "edm": edm,
  "dpmpp_2m": dpm,
  "dpmpp_3m": functools.partial(dpm, order=3),
  "dpmpp_2s": dpm_2s,
  "dpm_2m": functools.partial(dpm, of="eps"),
  "sde_dpmpp_2m": functools.partial(dpm, sde=True),
}


def table(sampler: str, path: Path, times, targets=None, **options) -> Table:
  """A sampler's calls and coefficients. Raises ValueError for what it cannot do; see `sample`."""
  function = lookup(SAMPLERS, sampler, "sampler")
  allowed = dict(list(inspect.signature(function).parameters.items())[3:])
  for option in options:
    lookup(allowed, option, f"option of sampler {sampler!r}")
  times = check_times(path, times)
  s = times[1:] if targets is None else np.asarray(targets, np.float64)
  if s.shape != times[1:].shape or (s > times[:-1]).any():
    raise ValueError(f"targets = {s}: expected {len(times) - 1} times, none after {times[:-1]}")
  with np.errstate(all="ignore"):
    result = function(path, times[:-1], s, **options)
  for name, term in result.terms.items():
    if not np.isfinite(term).all():
      t = result.t[~np.isfinite(term)][0]
      raise ValueError(f"sampler {sampler!r} on path {path.name!r}: its multiple of {name!r} is "
                       f"not finite at t = {t:g}, so let the grid start or end elsewhere")
  return result


def sample(denoise: Callable, x, times, path: Path, sampler: str = "ddim", *, rng=None, noise=None,
           targets=None, trajectory: bool = False, **options):
  """Takes x from times[0] down to times[-1]: [b, ...] -> [b, ...], jitted or not.

  Args:
    denoise: (x [b, ...], t) -> (x_0, eps) or `predictions.Denoised`, see `predictions.denoiser`.
    x: at times[0]; for pure noise, path.sigma(times[0]) times a standard normal.
    times: falling NumPy times [n + 1], see `grids`.
    path: whose times they are.
    sampler: a name in `SAMPLERS`.
    rng: of a stochastic sampler, whose call k draws an array like x from fold_in(rng, k): the same
      on any mesh.
    noise: [calls, b, ...], instead of drawing.
    targets: times [n] that steps go to, if not where the next begins (published DDPM and DDIM code
      goes to t - T // n, on grids whose steps are not that long too).
    trajectory: also return {"x", "x0"}, each [calls, b, ...]: x after and x_0 at each call.
    **options: of the sampler.

  Raises ValueError before anything is compiled.
  """
  t, terms = table(sampler, path, times, targets, **options)
  stochastic = bool({"noise", "churn"} & terms.keys())
  if stochastic and (rng is None) == (noise is None):
    raise ValueError(f"sampler {sampler!r} draws noise: give either rng or noise")
  if noise is not None and noise.shape != (len(t), *x.shape):
    raise ValueError(f"noise of shape {noise.shape}: expected {(len(t), *x.shape)}")

  def call(carry, inputs):
    x, past = carry
    k, t, c, z = inputs
    if stochastic and noise is None:
      z = jax.random.normal(jax.random.fold_in(rng, k), x.shape, x.dtype)
    if "churn" in c:
      x = x + c["churn"] * z
    x0, eps, variance = (*denoise(x, t), None)[:3]
    if "log_small" in c:
      if variance is None:
        raise ValueError("variance = 'learned': the denoiser gives none; see "
                         "predictions.denoiser(learned_variance=True)")
      share = (variance + 1) / 2
      log_variance = share * c["log_large"] + (1 - share) * c["log_small"]
      z = z * jnp.exp(log_variance / 2)
    value = {"x": x, "x0": x0, "eps": eps, "noise": z, **past}
    new = sum(c[name] * value[name] for name in c if name in value)
    return (new, {name: value[PAST[name]] for name in past}), (
      {"x": new, "x0": x0} if trajectory else None)

  past = {name: jnp.zeros_like(x) for name in PAST if name in terms}
  terms, noise = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), (terms, noise))
  # Times are not rounded with x: to bfloat16, 999 and 998.5 are both 1000.
  inputs = (jnp.arange(len(t)), jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32)), terms,
            noise)
  (x, _), states = jax.lax.scan(call, (x, past), inputs)
  return (x, states) if trajectory else x
