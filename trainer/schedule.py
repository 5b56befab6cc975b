"""Learning-rate schedules as multipliers of the peak rate: step -> [0, 1]."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
import optax

# (steps, end, timescale, drops) -> what stands between warm-up and cool-down.
DECAYS: Mapping[str, Callable] = {
  "cosine": lambda steps, end, *_: optax.cosine_decay_schedule(1.0, steps, alpha=end),
  "linear": lambda steps, end, *_: optax.linear_schedule(1.0, end, steps),
  "constant": lambda *_: optax.constant_schedule(1.0),
  "rsqrt": lambda steps, end, timescale, _: (
    lambda step: (1 + jnp.maximum(step, 0) / timescale) ** -0.5),
  "multistep": lambda steps, end, timescale, drops: optax.piecewise_constant_schedule(
    1.0, {round(steps * at): 0.1 for at in drops}),
}


def make(*, total_steps: int, name: Literal[*DECAYS] = "cosine", warmup_steps: int = 0,
         warmup_from: float = 0.0, cooldown_steps: int = 0, end: float = 0.0,
         timescale: float = 10_000.0, drops: tuple[float, ...] = (), from_start: bool = False,
         hold_steps: int = 1, delay_steps: int = 0) -> Callable:
  """Linear warm-up, the named decay, a linear cool-down to 0.

  Args:
    total_steps: of the run.
    name: a key of DECAYS. Warm-up-stable-decay is "constant" with a cool-down; 2106.04560 sec. 3.5
      is "rsqrt" with one.
    warmup_steps, cooldown_steps: in steps (or _epochs or _examples in a config).
    warmup_from: multiplier that warm-up begins at, in [0, 1].
    end: multiplier that cosine and linear end at, in [0, 1].
    timescale: of rsqrt, in steps.
    drops: shares of the run after warm-up at which multistep falls tenfold.
    from_start: whether the decay began with the run and warm-up only lies over it, as timm's do.
    hold_steps: for how many steps the rate stays as it is; an epoch where a recipe sets it once in
      an epoch.
    delay_steps: by how much all of it comes late, as where a rate is set at an epoch's end.
  """
  overlap = 0 if from_start else warmup_steps
  middle = total_steps - overlap - cooldown_steps
  if middle < 0 or warmup_steps + cooldown_steps > total_steps:
    raise ValueError(f"schedule: warm-up ({warmup_steps} steps) and cool-down ({cooldown_steps}) "
                     f"are longer than the run ({total_steps})")
  for field, value in {"warmup_from": warmup_from, "end": end}.items():
    if not 0 <= value <= 1:
      raise ValueError(f"schedule.{field} = {value}: expected a number in [0, 1]")
  if hold_steps < 1 or delay_steps < 0:
    raise ValueError(f"schedule.hold_steps = {hold_steps}, schedule.delay_steps = {delay_steps}: "
                     "expected at least 1, and at least 0")
  decay = DECAYS[name](max(middle, 1), end, timescale, drops)
  pieces = [optax.linear_schedule(warmup_from, 1.0, max(warmup_steps, 1)),
            lambda step: decay(step + warmup_steps - overlap),
            optax.linear_schedule(float(decay(middle)), 0.0, max(cooldown_steps, 1))]
  joined = optax.join_schedules(pieces, [warmup_steps, total_steps - cooldown_steps])
  if hold_steps == 1 and not delay_steps:
    return joined
  return lambda step: joined(jnp.maximum(step // hold_steps * hold_steps - delay_steps, 0))
