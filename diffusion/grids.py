"""Time grids of samplers: [n + 1] falling float64 times, the last being where the data is.

A sampler calls the denoiser at all but the last. Made on the host, before anything is compiled.
"""

import inspect
import math

import numpy as np

from diffusion.paths import Path, check_times, lookup


def uniform(path: Path, steps: int, start: float | None = None, end: float | None = None,
            final: float | None = None):
  """Equal steps in t from `start` (default t_max) to `final` (default t_data).

  With `end`, the last call is there, equal steps lead to it, and one more step leads to `final`.
  """
  start, final = _default(start, path.t_max), _default(final, path.t_data)
  return np.linspace(start, final, steps + 1) if end is None else np.append(
    np.linspace(start, end, steps), final)


def quadratic(path: Path, steps: int, start: float | None = None, final: float | None = None):
  """Equal steps in sqrt(t) (2010.02502 app. D.2); on a discrete path of its integers, then t_data.

  There, `start` 0.8 T is the published one.
  """
  start = _default(start, path.t_max)
  if not path.steps:
    return np.linspace(start**0.5, _default(final, path.t_data)**0.5, steps + 1) ** 2
  return np.append(np.floor(np.linspace(start**0.5, 0, steps) ** 2), _default(final, path.t_data))


def karras(path: Path, steps: int, rho: float = 7.0, start: float | None = None,
           end: float | None = None, final: float | None = None):
  """Noise levels sigma / alpha equally spaced in their rho-th root (2206.00364 eq. 5).

  From those of time `start` (default t_max) to `end` (default t_min), then `final`.
  """
  high, low = _sigmas(path, start, end)
  return _then(path, np.linspace(high**(1 / rho), low**(1 / rho), steps)**rho, start, end, final)


def log_snr(path: Path, steps: int, start: float | None = None, end: float | None = None,
            final: float | None = None):
  """Noise levels equally spaced in log-SNR (2206.00927 sec. 3.4), also called exponential."""
  high, low = np.log(_sigmas(path, start, end))
  return _then(path, np.exp(np.linspace(high, low, steps)), start, end, final)


def shifted(path: Path, steps: int, shift: float = 3.0, start: float | None = None,
            end: float | None = None, final: float | None = None):
  """A uniform grid after `shift_times`, on a path with times in [0, 1]."""
  if path.t_max != 1:
    raise ValueError(f"grid 'shifted': path {path.name!r} has times up to {path.t_max:g}, not 1")
  return shift_times(uniform(path, steps, start, end, final), shift)


def discrete(path: Path, steps: int, spacing: str = "trailing", offset: int = 0,
             rounded: bool = True, drop_last: bool = False, final: float | None = None):
  """Some of a discrete path's T integers, as published (2305.08891 table 2), then `final`.

  Args:
    path: a discrete one.
    steps: n.
    spacing: "leading" (multiples of T // n), "trailing" (T - 1 and back by T / n), "linspace"
      (equal steps from T - 1 to 0) or "respaced": those steps as 2102.09672's and DiT's code adds
      them up from 0, whose rounding takes the other integer at some of 21 steps, say.
    offset: added to each, where leading.
    rounded: False keeps the fractions of "linspace".
    drop_last: make n + 1 and leave out the least noisy (DPM-Solver's leading and linspace).
    final: -1 (default) is the data; 0 is the least noisy step, where published code for latents
      ends.
  """
  count, T = steps + drop_last, path.steps
  if not T or count > T:
    raise ValueError(f"grid 'discrete' of {steps} steps: path {path.name!r} has {T} to choose from")
  stride = (T - 1) / max(count - 1, 1)
  times = lookup({"leading": np.arange(count)[::-1] * (T // count) + offset,
                  "trailing": np.round(T - np.arange(count) * T / count) - 1,
                  "linspace": np.linspace(T - 1, 0, count),
                  "respaced": np.cumsum([0, *[stride] * (count - 1)])[::-1]}, spacing, "spacing")
  times = np.round(times) if rounded else times
  return np.append(times[:steps], _default(final, path.t_data))


GRIDS = {"uniform": uniform, "quadratic": quadratic, "karras": karras, "log_snr": log_snr,
         "shifted": shifted, "discrete": discrete}


def make(grid: str, path: Path, steps: int, **options) -> np.ndarray:
  """GRIDS[grid](path, steps, **options): [steps + 1]. Raises ValueError for what it cannot be."""
  function = lookup(GRIDS, grid, "grid")
  allowed = dict(list(inspect.signature(function).parameters.items())[2:])
  for option in options:
    lookup(allowed, option, f"option of grid {grid!r}")
  if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
    raise ValueError(f"steps = {steps!r}: expected at least one")
  return check_times(path, function(path, steps, **options), f"grid {grid!r}")


def shift_times(t, shift: float):
  """s t / (1 + (s - 1) t) (2403.03206 eq. 23): s times the noise level t / (1 - t)."""
  return shift * t / (1 + (shift - 1) * t)


def dynamic_shift(tokens: int, base_shift: float = 0.5, max_shift: float = 1.15,
                  base_tokens: int = 256, max_tokens: int = 4096) -> float:
  """A shift e^mu, mu linear in the number of tokens, from `base_shift` to `max_shift`."""
  slope = (max_shift - base_shift) / (max_tokens - base_tokens)
  return math.exp(base_shift + slope * (tokens - base_tokens))


def to_sigma(path: Path, times, linear: bool = False) -> np.ndarray:
  """Times as sigma / alpha, which are the times of `predictions.sigma_frame`.

  `linear` interpolates sigma rather than its logarithm between a discrete path's steps.
  """
  def sigma(t):
    return np.exp(-path.log_snr(np.asarray(t, np.float64)) / 2)

  steps = np.arange(-1, path.steps)
  return np.interp(times, steps, sigma(steps)) if linear else sigma(times)


def _default(value, default):
  return default if value is None else value


def _sigmas(path, start, end):
  ends = np.array([_default(start, path.t_max), _default(end, path.t_min)])
  high, low = np.exp(-path.log_snr(ends) / 2)
  if not np.isfinite(high) or low <= 0:
    raise ValueError(f"noise levels of path {path.name!r} from t = {ends[0]:g} to {ends[1]:g} go "
                     f"from {high:g} to {low:g}: choose start and end so that both are finite and "
                     "positive")
  return high, low


def _then(path, sigmas, start, end, final):
  """Times of noise levels, the ends exactly as asked for, and the final time."""
  times = path.inverse(-2 * np.log(sigmas))
  times[0] = _default(start, path.t_max)
  if len(times) > 1:
    times[-1] = _default(end, path.t_min)
  return np.append(times, _default(final, path.t_data))
