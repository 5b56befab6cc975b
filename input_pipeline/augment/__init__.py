"""What the device does with batches: a file here for each way, named by `augment.name`.

Its `make(**fields of config.augment) -> Augment`. What the builder knows it is given if it
asks for it by name: `batch_size`, `latents` and `features`, those of the batches.
"""

from collections.abc import Callable
from typing import NamedTuple


class Augment(NamedTuple):
  """One way; both functions keep every key of the batch and replace what they change."""
  train: Callable  # (rng, batch) -> batch, under jit; what happens to an example depends on (rng,
  #                  its place in the batch) and never on the mesh
  eval: Callable   # (batch) -> batch of the same shapes, deterministic; one view
  to_pixels: Callable  # (images as these give them) -> NumPy, 0 is black and 1 white
