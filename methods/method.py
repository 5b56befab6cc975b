"""The contract between a learning method and the training loop."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Method(NamedTuple):
  """How one method learns, as pure functions.

  `extra` is what it carries beside parameters (momentum encoder, queue, statistics); {} for most.
  `draw` adds to a batch the randomness that belongs to its examples (noise, times). It sees the
  whole global batch, so that accumulating gradients over parts of it changes nothing. `warn` looks
  at logged metrics for what a person should know; it is said once. `statistics` is the path in
  `extra` of the running statistics that belong to params, a tree like theirs (there is none where
  the network has no batch norm): an average of params, and a run that starts from them, have them
  too.
  """

  init: Callable  # (rng, batch) -> (params, extra)
  loss: Callable  # (params, extra, batch, rng, step) -> (scalar, (extra, metrics))
  predict: Mapping[str, Callable]  # name -> (params, extra, batch, rng) -> leading batch axis
  draw: Callable = lambda rng, batch: batch  # (rng, batch) -> batch
  warn: Callable = lambda metrics: ""  # {name: float} -> a warning, or ""
  statistics: str = ""  # path in `extra`; "": none
  needs: tuple[str, ...] = ()  # features of a batch; a second view is NAME_2. (): it does not say
