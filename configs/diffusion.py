"""Diffusion and flow matching, class-conditional.

  python train.py --config=configs/diffusion.py          flow matching on embedded digits, minutes
                                                         on two CPU cores
  python train.py --config=configs/diffusion.py:vp       the same with a variance preserving path
  python train.py --config=configs/diffusion.py:smoke    in seconds
"""

from configs.base import get_base

VARIANTS = ("", "vp", "smoke")


def get_config(variant: str = ""):
  config = get_base()
  return embedded(config, vp=variant == "vp", smoke=variant == "smoke")


def embedded(config, vp: bool, smoke: bool):
  """Digits of 16 pixels in the fonts of one family."""
  config.total_steps, config.eval_every_steps = 1500, 0
  config.ema_decay = 0.995
  config.model = dict(name="dit", patch=4, width=128, depth=4, heads=4, mlp_dim=512)
  config.method = dict(name="diffusion", prediction="x0", weighting="uniform", label_dropout=0.1)
  if vp:
    config.method.update(path="vp_cosine", samples=dict(
      sample=dict(sampler="dpmpp_2m", grid="log_snr", steps=50, grid_options=dict(start=0.995)),
      sample_10=dict(sampler="dpmpp_2m", grid="log_snr", steps=10, grid_options=dict(start=0.995))))
  else:
    config.method.update(path="linear", samples=dict(
      sample=dict(sampler="euler", steps=50), sample_10=dict(sampler="heun", steps=10)))
  config.data = dict(source="glyphs/digits_16", batch_size=64)
  config.augment = dict(affine=dict(degrees=3, translate=0.05, scale=(0.9, 1.1), shear=5))
  config.optimizer = dict(name="adamw", lr=2e-3, b2=0.95, weight_decay=0.0, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=100)
  config.evals = dict(samples=dict(predictions=("sample", "sample_10"), count=1000))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64)
    config.method.samples = dict(sample=dict(sampler="heun", steps=2))
    config.data.batch_size = 16
    config.schedule.warmup_steps = 2
    config.evals = dict(samples=dict(predictions=("sample",), count=20, per_class=2))
  return config
