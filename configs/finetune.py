"""From a trained run to a classifier: --config.init=DIR says which.

  python train.py --config=configs/finetune.py           the default MAE run (runs/mae); any ViT
  python train.py --config=configs/finetune.py:moco      the default MoCo run (runs/moco); a ResNet
  python train.py --config=configs/finetune.py:linear    a linear probe, trained as MAE's
  python train.py --config=configs/finetune.py:smoke     in seconds

Any run has an image network to start from: the model is then what that run's was, and the fields
here go before it. --config.optimizer.tuned_blocks=K tunes the last K blocks only (2111.06377
figure 9), --config.init.fresh=. trains the same network from scratch.

ImageNet-1k, end to end: MAE (2111.06377 table 9; published B/16 83.6, L/16 85.9, H/14 86.9) and
ViT at 384 pixels (2010.11929 table 4).

  imagenet_mae_b16, imagenet_mae_l16, imagenet_mae_h14, imagenet_vit_b16_384, imagenet_vit_l16_384

Linear probes: MAE (table 10; published B/16 68.0, L/16 75.8, H/14 76.6), MoCo (1911.05722 sec. 4.1:
v1 60.6, v2 67.5) and MoCo v3 (2104.02057; S/16 73.2, B/16 76.7).

  imagenet_mae_b16_linear, imagenet_mae_l16_linear, imagenet_mae_h14_linear,
  imagenet_moco_r50_linear, imagenet_moco_vit_s16_linear, imagenet_moco_vit_b16_linear
"""

from configs.base import get_base

# MAE by size: base rate, layer decay, drop path, epochs, examples a GPU, as its repository
# fine-tunes.
MAE = {"imagenet_mae_b16": ("B/16", 5e-4, 0.65, 0.1, 100, 32),
       "imagenet_mae_l16": ("L/16", 1e-3, 0.75, 0.2, 50, 32),
       "imagenet_mae_h14": ("H/14", 1e-3, 0.75, 0.3, 50, 16)}
MAE_LINEAR = {f"{name}_linear": variant for name, (variant, *_) in MAE.items()}
MOCO_LINEAR = {"imagenet_moco_vit_s16_linear": "S/16", "imagenet_moco_vit_b16_linear": "B/16"}
VIT_384 = {"imagenet_vit_b16_384": "B/16", "imagenet_vit_l16_384": "L/16"}
VARIANTS = ("", "moco", "linear", "smoke", *MAE, *MAE_LINEAR, "imagenet_moco_r50_linear",
            *MOCO_LINEAR, *VIT_384)
ONLY_HEAD = "^(?!head)"  # what is frozen


def get_config(variant: str = ""):
  config = get_base()
  config.init = dict(run="")
  config.method = dict(name="supervised")
  config.evals = dict(classification={})
  if variant in MAE:
    return mae(config, *MAE[variant])
  if variant in MAE_LINEAR:
    return mae_linear(config, MAE_LINEAR[variant])
  if variant == "imagenet_moco_r50_linear":
    return moco_linear(config)
  if variant in MOCO_LINEAR:
    return moco_vit_linear(config, MOCO_LINEAR[variant])
  if variant in VIT_384:
    return vit_384(config, VIT_384[variant])
  return embedded(config, variant)


def embedded(config, variant: str):
  """Letters in the fonts of one family, tested on two families never seen; as configs/vit.py."""
  config.init.run = "runs/moco" if variant == "moco" else "runs/mae"
  config.total_steps, config.eval_every_steps = 300, 0
  config.data = dict(source="glyphs/letters", batch_size=128)
  config.augment = dict(affine=dict(degrees=5, translate=0.1, scale=(0.8, 1.15), shear=12))
  config.optimizer = dict(name="adamw", lr=4e-3, weight_decay=0.05, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=30)
  if variant == "moco":
    config.total_steps, config.optimizer.lr = 150, 8e-3  # in 600, from scratch is as good
  elif variant == "linear":
    config.model.probe_norm = True
    config.optimizer = dict(name="lars", base_lr=0.1, frozen=ONLY_HEAD)
  else:
    config.optimizer.layer_decay = 0.75
  if not variant:
    config.model.pool_before_norm = True  # as MAE is fine-tuned
  if variant == "smoke":
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.data.update(source="glyphs/digits_16", batch_size=16)
    config.schedule.warmup_steps = 2
  return config


def imagenet(config, epochs: int, batch_size: int, pixels: int = 224):
  """What all share: streaming decode, random crops, flips."""
  config.dtype = "bfloat16"
  config.total_epochs, config.eval_every_epochs = epochs, 5
  config.log_every_steps, config.checkpoint.every_epochs = 50, 1
  config.data = dict(source="tfds:imagenet2012", batch_size=batch_size, workers=16,
                     eval_split="validation")
  config.augment = dict(image_size=pixels, crop_area=(0.08, 1.0), eval_crop=0.875, flip=True,
                        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  return config


def mae(config, variant, base_lr, layer_decay, drop_path, epochs, mix_size):
  """Table 9, with the rate and layer decay of its repository's commands."""
  config = imagenet(config, epochs, batch_size=1024)
  config.model = dict(name="vit", variant=variant, num_classes=1000, class_token=True, pool="mean",
                      pool_before_norm=True, drop_path=drop_path, fused_init=True, head_init=2e-5,
                      scan=True)
  config.method.label_smoothing = 0.1
  config.augment.update(randaugment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0,
                        mix_size=mix_size)
  config.optimizer = dict(name="adamw", base_lr=base_lr, weight_decay=0.05, layer_decay=layer_decay)
  config.schedule = dict(name="cosine", warmup_epochs=5, end=1e-6 / (base_lr * 1024 / 256))
  return config


def mae_linear(config, variant):
  """Table 10: the class token, normalised by a GPU's statistics, of 512 images, under LARS."""
  config = imagenet(config, epochs=90, batch_size=16384)
  config.model = dict(name="vit", variant=variant, num_classes=1000, pool="cls", probe_norm=True,
                      bn_groups=32, fused_init=True, head_init=0.01, scan=True)
  config.optimizer = dict(name="lars", base_lr=0.1, momentum=0.9, frozen=ONLY_HEAD)
  config.schedule = dict(name="cosine", warmup_epochs=10)
  return config


def moco_linear(config):
  """1911.05722 sec. 4.1: pooled features of a ResNet-50 as it is, a rate of 30."""
  config = imagenet(config, epochs=100, batch_size=256)
  config.augment.interpolation = "linear"
  config.model = dict(name="resnet", variant="50", num_classes=1000, head_init=0.01)
  config.method.image_train = False
  config.optimizer = dict(name="sgd", lr=30.0, momentum=0.9, frozen=ONLY_HEAD)
  config.schedule = dict(name="multistep", drops=(0.6, 0.8))
  return config


def moco_vit_linear(config, variant):
  """2104.02057 appendix A and its repository's commands: the class token, SGD, 90 epochs."""
  config = imagenet(config, epochs=90, batch_size=1024)
  config.augment.interpolation = "linear"
  config.model = dict(name="vit", variant=variant, num_classes=1000, pool="cls", heads=12,
                      head_init=0.01, scan=True)
  config.optimizer = dict(name="sgd", base_lr=3.0, momentum=0.9, frozen=ONLY_HEAD)
  config.schedule = dict(name="cosine", hold_epochs=1)
  return config


def vit_384(config, variant):
  """2010.11929 appendix B.1.1: 20,000 steps of 512 at 384 pixels, the rate of its code's default.

  L/16 has dropout (vit_jax/configs/models.py of google-research/vision_transformer).
  """
  config = imagenet(config, epochs=1, batch_size=512, pixels=384)
  del config.total_epochs
  config.total_steps = 20_000
  config.model = dict(name="vit", variant=variant, num_classes=1000, pool="cls",
                      dropout=0.1 if variant == "L/16" else 0.0, scan=True)
  config.augment.update(crop_area=(0.05, 1.0), eval_crop=1.0, eval_squash=True,
                        interpolation="linear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.optimizer = dict(name="sgd", lr=0.03, momentum=0.9, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=500)
  return config
