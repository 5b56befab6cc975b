"""Momentum Contrast pre-training.

  python train.py --config=configs/moco.py           embedded letters, minutes on two CPU cores
  python train.py --config=configs/moco.py:smoke     the same in seconds (smoke_v3: a ViT with v3)

MoCo v1 (1911.05722) and v2 (2003.04297), ResNet-50, ImageNet-1k, 200 epochs; 8 groups of batch
statistics stand for the papers' 8 GPUs. Published linear probe: v1 60.6, v2 67.5 (with
--config.total_epochs=800: 71.1).

  imagenet_r50_v1, imagenet_r50_v2

MoCo v3 (2104.02057): ResNet-50 in 100 epochs, published linear probe 68.9 (300: 72.8, 1000: 74.6);
ViT in 300 epochs, published S/16 73.2, B/16 76.7 (fine-tuned 81.4, 83.2).

  imagenet_r50_v3, imagenet_vit_s16_v3, imagenet_vit_b16_v3
"""

from configs.base import get_base

# Its S has twelve heads too (vits.py of facebookresearch/moco-v3).
VIT_V3 = {"imagenet_vit_s16_v3": "S/16", "imagenet_vit_b16_v3": "B/16"}
VARIANTS = ("", "smoke", "smoke_v3", "imagenet_r50_v1", "imagenet_r50_v2", "imagenet_r50_v3",
            *VIT_V3)


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="moco")
  if variant in ("imagenet_r50_v1", "imagenet_r50_v2"):
    return queue(config, v2=variant.endswith("v2"))
  if variant == "imagenet_r50_v3":
    return resnet_v3(config)
  if variant in VIT_V3:
    return vit_v3(config, VIT_V3[variant])
  if variant == "smoke_v3":
    return embedded_v3(config)
  return embedded(config, smoke=variant == "smoke")


def imagenet(config, epochs: int, batch_size: int):
  """What all ImageNet recipes share; streaming decode and two crops by worker processes."""
  config.dtype = "bfloat16"
  config.total_epochs = epochs
  config.log_every_steps, config.checkpoint.every_epochs = 50, 5
  config.model = dict(name="moco", head_kernel_init="torch")
  config.data = dict(source="tfds:imagenet2012", batch_size=batch_size, workers=16,
                     eval_split="validation")
  config.augment = dict(image_size=224, crop_area=(0.2, 1.0), eval_crop=0.875,
                        interpolation="linear", flip=True, second_view={},
                        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  config.evals = dict(knn={})
  return config


def queue(config, v2: bool):
  """1911.05722 sec. 3.3 and 4, and 2003.04297 sec. 2. Weight decay is on every parameter."""
  config = imagenet(config, epochs=200, batch_size=256)
  config.model.update(backbone="resnet", variant="50", dim=128, bn_groups=8,
                      projector_hidden=(2048,) if v2 else ())
  config.method.update(queue_size=65536, momentum=0.999, temperature=0.2 if v2 else 0.07)
  config.optimizer = dict(name="sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, decay="")
  if v2:
    config.augment.update(color_jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, grayscale=0.2,
                          blur=0.5)
    config.schedule = dict(name="cosine", hold_epochs=1)
  else:
    config.augment.update(grayscale=0.2, grayscale_first=True, color_jitter=(0.4, 0.4, 0.4, 0.4))
    config.schedule = dict(name="multistep", drops=(0.6, 0.8))
  return config


def v3(config, epochs: int, crop_area):
  """What v3's recipes share (2104.02057 sec. 4 and appendix A): no queue, two unlike views."""
  config = imagenet(config, epochs, batch_size=4096)
  config.model.update(dim=256, head_norm=True, predictor_hidden=(4096,))
  config.method.update(queue_size=0, momentum_schedule="cosine")
  config.augment.update(crop_area=crop_area, color_jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8,
                        grayscale=0.2, blur=1.0, second_view=dict(blur=0.1, solarize=0.2))
  return config


def resnet_v3(config):
  """Table 1 of 2104.02057 and its repository's command for 100 epochs."""
  config = v3(config, epochs=100, crop_area=(0.2, 1.0))
  config.model.update(backbone="resnet", variant="50", zero_init=True, projector_hidden=(4096,),
                      predictor_last_norm=False)
  config.method.update(momentum=0.99, temperature=1.0)
  config.optimizer = dict(name="lars", base_lr=0.6, momentum=0.9, weight_decay=1e-6)
  config.schedule = dict(name="cosine", warmup_epochs=10)
  return config


def vit_v3(config, variant: str):
  """Sec. 4.2 of 2104.02057; the patch projection stays random (sec. 4.1)."""
  config = v3(config, epochs=300, crop_area=(0.08, 1.0))
  config.model.update(backbone="vit", variant=variant, heads=12, positions="sincos2d_moco",
                      patch_init="xavier", token_init=1e-6, scan=True,
                      projector_hidden=(4096, 4096))
  config.method.update(momentum=0.99, temperature=0.2)
  config.optimizer = dict(name="adamw", base_lr=1.5e-4, weight_decay=0.1, decay="",
                          frozen="backbone/embed/projection")
  config.schedule = dict(name="cosine", warmup_epochs=40)
  return config


def embedded(config, smoke: bool):
  """Letters in the fonts of one family, probed on two families never seen: v2, a narrow ResNet."""
  config.total_steps, config.eval_every_steps = 1500, 0
  config.expect = "linear probe 0.72 +- 0.03, 20-NN 0.61 +- 0.03 (untrained 0.31, 0.19)"
  config.model = dict(name="moco", backbone="resnet", variant="18", stem="small",
                      depths=(1, 1, 1, 1), widths=(8, 16, 32, 128), bn_groups=8, dim=64,
                      projector_hidden=(128,))
  config.method.update(queue_size=4096, momentum=0.99, temperature=0.1)
  config.data = dict(source="glyphs/letters", batch_size=128)
  config.augment = dict(affine=dict(degrees=10, translate=0.1, scale=(0.7, 1.2), shear=15),
                        second_view={})
  config.optimizer = dict(name="adamw", lr=2e-3, b2=0.95, weight_decay=0.05)
  config.schedule = dict(name="cosine", warmup_steps=100)
  baselines = ("untrained", "pixels")
  config.evals = dict(knn=dict(baselines=baselines), linear_probe=dict(baselines=baselines))
  return seconds(config, widths=(8, 32), depths=(1, 1), bn_groups=2) if smoke else config


def embedded_v3(config):
  """v3 on a ViT, in seconds."""
  config = embedded(config, smoke=False)
  config.model = dict(name="moco", backbone="vit", patch=4, width=32, depth=2, heads=2, mlp_dim=64,
                      positions="sincos2d_moco", head_norm=True, predictor_hidden=(32,))
  config.method.update(queue_size=0, momentum_schedule="cosine", temperature=0.2)
  config.augment.second_view = dict(blur=0.1, solarize=0.2)
  config.optimizer.frozen = "backbone/embed/projection"
  return seconds(config)


def seconds(config, **model):
  """The same in seconds, for tests."""
  config.expect = ""
  config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
  config.model.update(dim=16, projector_hidden=(32,), **model)
  config.method.queue_size = min(config.method.queue_size, 40)
  config.data.update(source="glyphs/digits_16", batch_size=16)
  config.schedule.warmup_steps = 2
  config.evals = dict(knn=dict(baselines=("untrained",)))
  return config
