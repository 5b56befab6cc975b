"""Masked autoencoder pre-training (2111.06377).

  python train.py --config=configs/mae.py            embedded letters, minutes on two CPU cores
  python train.py --config=configs/mae.py:smoke      the same in seconds

The paper's ImageNet-1k recipe (appendix A.1, table 8), 800 epochs; --config.total_epochs=1600 for
its final results. Published top-1 after fine-tuning from 1600 epochs: B/16 83.6, L/16 85.9, H/14
86.9 (table 3); L/16, 800 epochs: 84.9 fine-tuned, 73.5 linear probe (table 1). S/16 is not in the
paper.

  imagenet_s16, imagenet_b16, imagenet_l16, imagenet_h14
"""

from configs.base import get_base

IMAGENET = {"imagenet_s16": "S/16", "imagenet_b16": "B/16", "imagenet_l16": "L/16",
            "imagenet_h14": "H/14"}
VARIANTS = ("", "smoke", *IMAGENET)


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="mae", mask_ratio=0.75, norm_pix=True)
  if variant in IMAGENET:
    return imagenet(config, IMAGENET[variant])
  return embedded(config, smoke=variant == "smoke")


def embedded(config, smoke: bool):
  """Letters in the fonts of one family, probed on two families never seen."""
  config.total_steps, config.eval_every_steps = 1400, 0
  config.expect = "linear probe 0.49 +- 0.01, 20-NN 0.32 +- 0.05 (untrained 0.12, 0.03)"
  config.model = dict(name="mae", patch=4, width=128, depth=4, heads=2, mlp_dim=512,
                      decoder_width=64, decoder_depth=2, decoder_heads=2)
  # Most patches of a glyph are blank: nothing to normalise, and at 75% often no ink is left to see.
  config.method.update(norm_pix=False, mask_ratio=0.6)
  config.data = dict(source="glyphs/letters", batch_size=128)
  config.augment = dict(affine=dict(degrees=5, translate=0.1, scale=(0.8, 1.15), shear=12))
  config.optimizer = dict(name="adamw", lr=2e-3, b2=0.95, weight_decay=0.05)
  config.schedule = dict(name="cosine", warmup_steps=100)
  baselines = ("untrained", "pixels")
  config.evals = dict(knn=dict(baselines=baselines), linear_probe=dict(baselines=baselines),
                      reconstruction=dict(examples=8, ratios=(0.5, 0.75, 0.9)))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=2, mlp_dim=64, decoder_width=16)
    config.data.update(source="glyphs/digits_16", batch_size=16)
    config.schedule.warmup_steps = 2
    config.evals = dict(knn=dict(baselines=baselines[:1]), reconstruction=dict(examples=2))
  return config


def imagenet(config, variant):
  """Table 8, with the paper's decoder of 8 blocks of width 512."""
  config.dtype = "bfloat16"
  config.total_epochs = 800
  config.log_every_steps, config.checkpoint.every_epochs = 50, 5
  config.model = dict(name="mae", variant=variant, decoder_width=512, decoder_depth=8,
                      decoder_heads=16, scan=True)
  config.data = dict(source="tfds:imagenet2012", batch_size=4096, workers=16,
                     eval_split="validation")
  config.augment = dict(image_size=224, crop_area=(0.2, 1.0), eval_crop=0.875, flip=True,
                        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  config.optimizer = dict(name="adamw", base_lr=1.5e-4, b1=0.9, b2=0.95, weight_decay=0.05,
                          decay=r"(kernel|/cls|mask_token)$")  # all but vectors
  config.schedule = dict(name="cosine", warmup_epochs=40)
  config.evals = dict(reconstruction=dict(examples=8, ratios=(0.5, 0.75, 0.9)))
  return config
