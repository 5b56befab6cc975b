"""A dense network on the mean over time."""

import flax.linen as nn


class Listener(nn.Module):
  num_classes: int
  width: int = 32  # of the hidden layer

  @nn.compact
  def __call__(self, x):
    """x [b, t, f] -> features [b, width], logits [b, classes]."""
    x = nn.relu(nn.Dense(self.width)(x.mean(1)))
    return x, nn.Dense(self.num_classes)(x)


def make(*, num_classes: int, width: int = 32, dtype: str = "float32"):
  """Args: width: of the hidden layer."""
  return Listener(num_classes, width)
