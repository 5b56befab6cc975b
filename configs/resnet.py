"""Supervised ResNet (1512.03385).

  python train.py --config=configs/resnet.py         embedded letters, minutes on two CPU cores
  python train.py --config=configs/resnet.py:smoke   the same in seconds

ResNet-50, ImageNet-1k, 90 epochs as 1706.02677, of 256 images or with warm-up of 8192: published
top-1 76.4 and 76.3. ResNet-18 as torchvision trained its first weights, published 69.8. Batch norm
is over 32 images, a GPU's share there: keep data.batch_size / model.bn_groups at 32.

  imagenet_r50, imagenet_r50_8k, imagenet_r18
"""

from configs.base import get_base

VARIANTS = ("", "smoke", "imagenet_r50", "imagenet_r50_8k", "imagenet_r18")


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="supervised")
  config.evals = dict(classification={})
  if variant == "imagenet_r18":
    return torchvision(config, "18")
  if variant.startswith("imagenet"):
    return one_hour(config, "50", large=variant.endswith("8k"))
  return embedded(config, smoke=variant == "smoke")


def embedded(config, smoke: bool):
  """Letters in the fonts of one family, tested on two families never seen."""
  config.total_steps, config.eval_every_steps = 1500, 500
  config.expect = "top-1 0.85 on unseen font families (one seed)"
  config.model = dict(name="resnet", variant="18", stem="small", depths=(1, 1, 1, 1),
                      widths=(8, 16, 32, 64), zero_init=True)
  config.data = dict(source="glyphs/letters", batch_size=128)
  config.augment = dict(affine=dict(degrees=5, translate=0.1, scale=(0.8, 1.15), shear=12))
  config.optimizer = dict(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
  config.schedule = dict(name="cosine", warmup_steps=100)
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(depths=(1, 1), widths=(8, 32))
    config.data.update(source="glyphs/digits_16", batch_size=16)
    config.schedule.warmup_steps = 2
  return config


def imagenet(config, variant: str, batch_size: int):
  """What all ImageNet recipes share; streaming decode and crop by worker processes."""
  config.dtype = "bfloat16"
  config.total_epochs, config.eval_every_epochs = 90, 10
  config.log_every_steps, config.checkpoint.every_epochs = 50, 1
  config.model = dict(name="resnet", variant=variant, num_classes=1000, bn_groups=batch_size // 32)
  config.data = dict(source="tfds:imagenet2012", batch_size=batch_size, workers=16,
                     eval_split="validation")
  config.augment = dict(image_size=224, crop_area=(0.08, 1.0), eval_crop=0.875,
                        interpolation="linear", flip=True,
                        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  return config


def one_hour(config, variant, large: bool):
  """1706.02677 sec. 5.1, table 1: the rate falls tenfold after epochs 30, 60 and 80."""
  config = imagenet(config, variant, batch_size=8192 if large else 256)
  config.model.update(zero_init=True, head_init=0.01)
  # Sec. 5.1: the scale and shift of batch norm alone do not decay.
  config.optimizer = dict(name="sgd", base_lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4,
                          decay=r"(kernel|head/bias)$")
  config.augment.interpolation = "bicubic"  # as its reference 12, fb.resnet.torch
  warmup = 5 if large else 0
  drops = tuple((epoch - warmup) / (90 - warmup) for epoch in (30, 60, 80))
  # Sec. 2.2: warm-up begins at the rate of a batch of 256.
  config.schedule = dict(name="multistep", warmup_epochs=warmup,
                         warmup_from=256 / config.data.batch_size, drops=drops)
  return config


def torchvision(config, variant):
  """Weight decay on every parameter, the rate falls tenfold after epochs 30 and 60."""
  config = imagenet(config, variant, batch_size=256)
  config.model.head_init = (3 * 512) ** -0.5  # the spread of PyTorch's uniform
  config.optimizer = dict(name="sgd", base_lr=0.1, momentum=0.9, weight_decay=1e-4, decay="")
  config.schedule = dict(name="multistep", drops=(1 / 3, 2 / 3))
  return config
