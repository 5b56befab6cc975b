"""SimSiam (2011.10566): a small encoder, and a predictor with a bottleneck."""

import flax.linen as nn


class Encoder(nn.Module):
  dim: int  # of the projection

  @nn.compact
  def __call__(self, x, train: bool):
    for width in (8, 16):
      x = nn.relu(nn.BatchNorm(not train)(nn.Conv(width, (3, 3), (2, 2), use_bias=False)(x)))
    return nn.BatchNorm(not train)(nn.Dense(self.dim)(x.mean((1, 2))))


class SimSiam(nn.Module):
  dim: int = 32  # of the projection

  def setup(self):
    self.encoder = Encoder(self.dim)
    self.predictor = nn.Sequential([nn.Dense(self.dim // 4), nn.relu, nn.Dense(self.dim)])

  def __call__(self, image, train: bool = False):
    """image [b, h, w, c] -> z, p, each [b, dim]."""
    z = self.encoder(image, train)
    return z, self.predictor(z)


def make(*, dim: int = 32, dtype: str = "float32"):
  """Args: dim: of the projection."""
  return SimSiam(dim)
