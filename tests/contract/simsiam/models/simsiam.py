"""SimSiam (2011.10566): a small encoder, and a predictor with a bottleneck."""

import flax.linen as nn


class SimSiam(nn.Module):
  dim: int = 32  # of the projection

  def setup(self):
    self.encoder = nn.Sequential([
      nn.Conv(8, (3, 3), (2, 2)), nn.relu, nn.Conv(16, (3, 3), (2, 2)), nn.relu,
      lambda x: x.mean((1, 2)), nn.Dense(self.dim), nn.LayerNorm()])
    self.predictor = nn.Sequential([nn.Dense(self.dim // 4), nn.relu, nn.Dense(self.dim)])

  def __call__(self, image):
    """image [b, h, w, c] -> z, p, each [b, dim]."""
    z = self.encoder(image)
    return z, self.predictor(z)


def make(*, dim: int = 32, dtype: str = "float32"):
  """Args: dim: of the projection."""
  return SimSiam(dim)
