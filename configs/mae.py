"""Masked autoencoder pre-training (2111.06377)."""

from configs.base import get_base

VARIANTS = ("", "smoke", "imagenet_s16", "imagenet_b16", "imagenet_l16", "imagenet_h14")


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="mae", mask_ratio=0.75, norm_pix=True)
  if variant.startswith("imagenet"):
    return imagenet(config, variant)
  return embedded(config, variant)


def embedded(config, variant):
  """Letters of the fonts that matplotlib ships; minutes on two CPU cores."""
  config.total_steps = 2400
  config.eval_every_steps = 800
  config.model = dict(name="mae", patch=4, width=128, depth=4, heads=4, mlp_dim=512,
                      decoder_width=64, decoder_depth=2, decoder_heads=4)
  config.method.norm_pix = False
  config.data = dict(source="glyphs/letters", batch_size=128)
  config.augment = dict(mean=0.5, std=0.5)
  config.optimizer = dict(name="adamw", lr=1e-3, b2=0.95, weight_decay=0.05)
  config.schedule = dict(name="cosine", warmup_steps=100)
  config.evals = dict(knn=dict(baselines=("untrained", "pixels")),
                      linear_probe=dict(baselines=("untrained", "pixels")),
                      reconstruction=dict(examples=8))
  if variant == "smoke":
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.schedule.warmup_steps = 2
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64, decoder_width=16, decoder_heads=2)
    config.data.update(source="glyphs/digits_16", batch_size=16)
    config.evals = dict(knn=dict(baselines=("untrained",)), reconstruction=dict(examples=2))
  return config


def imagenet(config, variant):
  """The paper's pre-training recipe (appendix A.1, table 8): 800 epochs, batch 4096, 224 px."""
  return config
