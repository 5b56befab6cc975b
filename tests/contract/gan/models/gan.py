"""A generator and a discriminator of small images."""

import math

import flax.linen as nn


class Gan(nn.Module):
  image_size: tuple[int, int]
  channels: int
  latent: int = 16  # length of the noise

  def setup(self):
    pixels = math.prod(self.image_size) * self.channels
    self.generator = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(pixels), nn.tanh])
    self.discriminator = nn.Sequential([nn.Dense(64), nn.leaky_relu, nn.Dense(1)])

  def generate(self, noise):
    """noise [b, latent] -> images [b, h, w, c]."""
    return self.generator(noise).reshape(-1, *self.image_size, self.channels)

  def judge(self, image):
    """image [b, h, w, c] -> logits [b]."""
    return self.discriminator(image.reshape(image.shape[0], -1))[:, 0]

  def __call__(self, noise):
    return self.judge(self.generate(noise))


def make(*, image_size: tuple[int, int], channels: int, latent: int = 16, dtype: str = "float32"):
  """Args: latent: length of the noise."""
  return Gan(tuple(image_size), channels, latent)
