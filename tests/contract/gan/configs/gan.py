"""A GAN of embedded digits: two rates (1706.08500), two steps of the discriminator to one."""

from configs.base import get_base

VARIANTS = ("",)


def get_config(variant: str = ""):
  config = get_base()
  config.total_steps, config.log_every_steps = 6, 1
  config.model = dict(name="gan")
  config.method = dict(name="gan", discriminator_steps=2)
  config.data = dict(source="glyphs/digits_16", batch_size=32)
  config.optimizer = dict(name="adamw", lr=1e-4, b1=0.5, groups=dict(
    discriminator=dict(path="^discriminator/", lr=4e-4)))
  config.schedule = dict(name="constant")
  config.ema_decay = 0.9
  return config
