"""The contract between a learning method and the training loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple


def check_fields(*rows: tuple):
  """Raises ValueError on the first of (name of a method's field, value, is it allowed, what is)."""
  for name, value, ok, allowed in rows:
    if not ok:
      raise ValueError(f"method.{name} = {value}: expected {allowed}")


class Phase(NamedTuple):
  """A part of the parameters with a loss of its own, as one of a GAN's two players.

  The loss sees all parameters; its gradient is taken of the part alone. A phase that is taken
  several times in a step has a share of the batch's rows each time: rows j, j + times, ...
  """

  loss: Callable  # (params, extra, batch, rng, step) -> (scalar, (extra, metrics))
  part: str = ""  # regular expression on the paths of what it trains; "": all parameters
  times: int = 1  # how often it is taken in a step


@dataclasses.dataclass(frozen=True)
class Contrast:
  """A loss that compares the examples of a batch with each other, to be called as any other.

  In two stages, so that where a batch comes in parts (`config.accumulate`) the features of all of
  them are compared: as many negatives, with the memory of one part.
  """

  embed: Callable  # (params, extra, batch, rng, step) -> (features, a tree [b, ...]; extra)
  compare: Callable  # (params, features, step) -> (scalar, metrics)

  def __call__(self, params, extra, batch, rng, step):
    features, extra = self.embed(params, extra, batch, rng, step)
    loss, metrics = self.compare(params, features, step)
    return loss, (extra, metrics)


class Method(NamedTuple):
  """How one method learns, as pure functions.

  `extra` is what it carries beside parameters (momentum encoder, queue, statistics); {} for most.
  `draw` adds to a batch the randomness that belongs to its examples (noise, times). It sees the
  whole global batch, so that accumulating gradients over parts of it changes nothing. `warn` looks
  at logged metrics for what a person should know; it is said once. `statistics` is the path in
  `extra` of the running statistics that belong to params, a tree like theirs (there is none where
  the network has no batch norm): an average of params, and a run that starts from them, have them
  too. `phases` are taken in turn within a step, each after what the one before it made of the
  parameters and of `extra`; a method has them or a loss.
  """

  init: Callable  # (rng, batch) -> (params, extra)
  loss: Callable | None  # (params, extra, batch, rng, step) -> (scalar, (extra, metrics))
  predict: Mapping[str, Callable]  # name -> (params, extra, batch, rng) -> leading batch axis
  draw: Callable = lambda rng, batch: batch  # (rng, batch) -> batch
  warn: Callable = lambda metrics: ""  # {name: float} -> a warning, or ""
  statistics: str = ""  # path in `extra`; "": none
  needs: tuple[str, ...] = ()  # features of a batch; a second view is NAME_2. (): it does not say
  phases: Mapping[str, Phase] = {}  # name -> Phase; its metrics are logged as NAME/METRIC

  @property
  def turns(self) -> Mapping[str, Phase]:
    """The phases; a loss alone is one, named "", on all parameters. Raises ValueError."""
    if bool(self.phases) == (self.loss is not None):
      raise ValueError("a method has a loss, or phases in its place: one of them")
    return self.phases or {"": Phase(self.loss)}
