"""The two players' losses, of which the generator's does not saturate (1406.2661 sec. 3)."""

import jax


def discriminator(real, fake):
  """Logits [b] of images and of samples -> [b]."""
  return jax.nn.softplus(-real) + jax.nn.softplus(fake)


def generator(fake):
  """Logits [b] of samples -> [b]."""
  return jax.nn.softplus(-fake)
