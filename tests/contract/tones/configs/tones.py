"""Which of eight pitches a noisy tone has."""

from configs.base import get_base

VARIANTS = ("",)


def get_config(variant: str = ""):
  config = get_base()
  config.total_steps, config.log_every_steps, config.checkpoint.every_steps = 400, 10, 20
  config.model = dict(name="listener")
  config.method = dict(name="listening")
  config.data = dict(source="tones", batch_size=32)
  config.augment = dict(name="spectrogram", window=128)
  config.optimizer = dict(name="adamw", lr=1e-2)
  config.schedule = dict(name="cosine", warmup_steps=10)
  config.evals = dict(classification={}, knn={})
  return config
