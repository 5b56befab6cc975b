"""Learning-rate schedules as multipliers of the peak rate: step -> [0, 1]."""

from collections.abc import Callable, Mapping

import optax

# (steps, end, timescale) -> what stands between warm-up and cool-down.
DECAYS: Mapping[str, Callable] = {
  "cosine": lambda steps, end, timescale: optax.cosine_decay_schedule(1.0, steps, alpha=end),
  "linear": lambda steps, end, timescale: optax.linear_schedule(1.0, end, steps),
  "constant": lambda steps, end, timescale: optax.constant_schedule(1.0),
  "rsqrt": lambda steps, end, timescale: lambda step: (1 + step / timescale) ** -0.5,
}
CHOICES = {"name": DECAYS}


def make(*, total_steps: int, name: str = "cosine", warmup_steps: int = 0,
         cooldown_steps: int = 0, end: float = 0.0, timescale: float = 10_000.0) -> Callable:
  """Linear warm-up from 0, the named decay, a linear cool-down to 0.

  Args:
    total_steps: of the run.
    name: a key of DECAYS. Warm-up-stable-decay is "constant" with a cool-down; 2106.04560 sec. 3.5
      is "rsqrt" with one.
    warmup_steps, cooldown_steps: in steps (or _epochs or _examples in a config).
    end: multiplier that cosine and linear end at, in [0, 1].
    timescale: of rsqrt, in steps.
  """
  middle = total_steps - warmup_steps - cooldown_steps
  if middle < 0:
    raise ValueError(f"schedule: warm-up ({warmup_steps} steps) and cool-down ({cooldown_steps}) "
                     f"are longer than the run ({total_steps})")
  decay = DECAYS[name](max(middle, 1), end, timescale)
  pieces = [optax.linear_schedule(0.0, 1.0, max(warmup_steps, 1)), decay,
            optax.linear_schedule(float(decay(middle)), 0.0, max(cooldown_steps, 1))]
  return optax.join_schedules(pieces, [warmup_steps, total_steps - cooldown_steps])
