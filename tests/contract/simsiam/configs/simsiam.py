"""SimSiam on embedded digits; the predictor's rate does not change (2011.10566 sec. 4.2)."""

from configs.base import get_base

VARIANTS = ("",)


def get_config(variant: str = ""):
  config = get_base()
  config.total_steps, config.log_every_steps = 30, 10
  config.model = dict(name="simsiam")
  config.method = dict(name="simsiam")
  config.data = dict(source="glyphs/digits_16", batch_size=32)
  config.augment = dict(image_size=16, crop_area=(0.5, 1.0),
                        second_view=dict(image_size=12, crop_area=(0.2, 0.6)))
  config.optimizer = dict(name="sgd", lr=0.05, momentum=0.9,
                          groups=dict(predictor=dict(path="^predictor/",
                                                     schedule=dict(name="constant"))))
  config.schedule = dict(name="cosine")
  config.evals = dict(knn={})
  return config
