"""The probability-flow ODE with adaptive steps (diffrax): samples and exact likelihoods."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.paths import Path, check_times, expand


def velocity(denoise: Callable, path: Path) -> Callable:
  """(x, t) -> dx/dt = alpha' x_0 + sigma' eps: 2011.13456 eq. 13 in this frame."""
  if path.d_alpha is None:
    raise ValueError(f"path {path.name!r} has no d alpha / dt, so no ODE: see "
                     "predictions.sigma_frame")

  def apply(x, t):
    x0, eps, *_ = denoise(x, t)
    return expand(path.d_alpha(t), x) * x0 + expand(path.d_sigma(t), x) * eps

  return apply


def _integrate(field, state, start, end, rtol, atol, max_steps):
  return jax.tree.map(lambda y: y[0], diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: field(y, t)), diffrax.Dopri5(), start, end, None, state,
    stepsize_controller=diffrax.PIDController(rtol, atol), max_steps=max_steps).ys)


def adaptive(denoise: Callable, x, path: Path, start: float | None = None, end: float | None = None,
             rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 4096):
  """Solves the ODE for x [b, ...] from time `start` (default t_max) to `end` (default t_min).

  One step size for the batch, of Dormand and Prince's fifth order pair; either way in time.
  """
  start = path.t_max if start is None else start
  end = path.t_min if end is None else end
  check_times(path, sorted([start, end], reverse=True))
  return _integrate(velocity(denoise, path), x, start, end, rtol, atol, max_steps)


def bits_per_dim(denoise: Callable, x, path: Path, rng=None, *, probes: int = 1,
                 exact: bool = False, bin_width: float = 1.0, rtol: float = 1e-5,
                 atol: float = 1e-5, max_steps: int = 4096):
  """-log2 p(x) / d by the instantaneous change of variables (2011.13456 eq. 39): [b].

  log p(x) = log N(x_T; 0, sigma_T^2 I) + the integral of the velocity's divergence from t_min to
  t_max. The denoiser must treat examples independently.

  Args:
    denoise: (x [b, ...], t) -> (x_0, eps).
    x: data [b, ...], dequantised if it is discrete.
    path: with a velocity.
    rng: of the trace estimate.
    probes: random signs v whose v^T J v are averaged (Hutchinson; 2011.13456 eq. 40).
    exact: the trace itself instead, by d products.
    bin_width: of one level in the units of x, for bits a level: 2 / 256 for bytes in [-1, 1].
    rtol, atol, max_steps: of the solver.
  """
  if rng is None and not exact:
    raise ValueError("bits_per_dim estimates a trace: give rng, or exact=True")
  flow, d = velocity(denoise, path), x[0].size
  if exact:
    directions = jnp.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:])
    directions = jnp.broadcast_to(directions, (d, *x.shape))
  else:
    directions = jax.random.rademacher(rng, (probes, *x.shape), x.dtype)

  def field(state, t):
    x = state[0]
    def product(v):
      return (v * jax.jvp(lambda x: flow(x, t), (x,), (v,))[1]).reshape(len(x), -1).sum(1)
    traces = jax.lax.map(product, directions)
    return flow(x, t), traces.sum(0) if exact else traces.mean(0)

  noise, integral = _integrate(field, (x, jnp.zeros(len(x), x.dtype)), path.t_min, path.t_max,
                               rtol, atol, max_steps)
  sigma = float(path.sigma(np.asarray(path.t_max)))
  prior = jax.scipy.stats.norm.logpdf(noise, scale=sigma).reshape(len(x), -1).sum(1)
  return -(prior + integral) / d / np.log(2) - np.log2(bin_width)
