"""Masks of bright rectangles."""

from configs.base import get_base

VARIANTS = ("",)


def get_config(variant: str = ""):
  config = get_base()
  config.total_steps, config.log_every_steps = 60, 20
  config.model = dict(name="fully_convolutional")
  config.method = dict(name="segmentation")
  config.data = dict(source="blobs", batch_size=32)
  config.augment = dict(image_size=20, crop_area=(0.5, 1.0), flip=True,
                        affine=dict(degrees=20, translate=0.1))
  config.optimizer = dict(name="adamw", lr=1e-2)
  config.schedule = dict(name="cosine", warmup_steps=5)
  config.evals = dict(overlap={})
  return config
