"""Generative adversarial networks (1406.2661): two players in turn."""

import jax

from losses import adversarial
from methods.method import Method, Phase


def make(model, *, discriminator_steps: int = 2) -> Method:
  """A `models.gan.Gan` learns to make images.

  Args:
    discriminator_steps: for each of the generator.
  """
  def noise(rng, count):
    return jax.random.normal(rng, (count, model.latent))

  def run(params, x, player):
    return model.apply({"params": params}, x, method=player)

  def init(rng, batch):
    return model.init(rng, noise(rng, 1))["params"], {}

  def discriminator(params, extra, batch, rng, step):
    fake = run(params, noise(rng, len(batch["image"])), "generate")
    real, fake = run(params, batch["image"], "judge"), run(params, fake, "judge")
    accuracy = ((real > 0).mean() + (fake < 0).mean()) / 2
    return adversarial.discriminator(real, fake).mean(), (extra, {"accuracy": accuracy})

  def generator(params, extra, batch, rng, step):
    fake = run(params, noise(rng, len(batch["image"])), "generate")
    return adversarial.generator(run(params, fake, "judge")).mean(), (extra, {})

  def sample(params, extra, batch, rng):
    return run(params, noise(rng, len(batch["label"])), "generate")

  return Method(init, None, {"sample": sample}, needs=("image",), phases={
    "discriminator": Phase(discriminator, "^discriminator/", discriminator_steps),
    "generator": Phase(generator, "^generator/")})
