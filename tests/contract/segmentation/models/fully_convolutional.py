"""Three convolutions that tell a class at each pixel."""

import flax.linen as nn


class FullyConvolutional(nn.Module):
  num_classes: int
  width: int = 16  # channels between

  @nn.compact
  def __call__(self, image):
    """image [b, h, w, c] -> logits [b, h, w, classes]."""
    for _ in range(2):
      image = nn.relu(nn.Conv(self.width, (3, 3))(image))
    return nn.Conv(self.num_classes, (1, 1))(image)


def make(*, num_classes: int, width: int = 16, dtype: str = "float32"):
  """Args: width: channels between."""
  return FullyConvolutional(num_classes, width)
