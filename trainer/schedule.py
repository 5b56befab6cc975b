"""Learning-rate schedules as multipliers of the peak rate: step -> [0, 1]."""

from collections.abc import Callable, Mapping

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
CHOICES = {"name": DECAYS}


def make(*, total_steps: int, name: str = "cosine", warmup_steps: int = 0,
         cooldown_steps: int = 0, end: float = 0.0, timescale: float = 10_000.0,
         drops: tuple[float, ...] = ()) -> Callable:
  """Linear warm-up from 0, the named decay, a linear cool-down to 0.

  Args:
    total_steps: of the run.
    name: a key of DECAYS. Warm-up-stable-decay is "constant" with a cool-down; 2106.04560 sec. 3.5
      is "rsqrt" with one.
    warmup_steps, cooldown_steps: in steps (or _epochs or _examples in a config).
    end: multiplier that cosine and linear end at, in [0, 1].
    timescale: of rsqrt, in steps.
    drops: shares of the run after warm-up at which multistep falls tenfold.
  """
  middle = total_steps - warmup_steps - cooldown_steps
  if middle < 0:
    raise ValueError(f"schedule: warm-up ({warmup_steps} steps) and cool-down ({cooldown_steps}) "
                     f"are longer than the run ({total_steps})")
  decay = DECAYS[name](max(middle, 1), end, timescale, drops)
  pieces = [optax.linear_schedule(0.0, 1.0, max(warmup_steps, 1)), decay,
            optax.linear_schedule(float(decay(middle)), 0.0, max(cooldown_steps, 1))]
  return optax.join_schedules(pieces, [warmup_steps, total_steps - cooldown_steps])
