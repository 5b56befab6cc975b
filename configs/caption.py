"""Captioning: an image network and a Transformer decoder that writes what it shows.

  python train.py --config=configs/caption.py          embedded letters and their names, minutes on
                                                       two CPU cores
  python train.py --config=configs/caption.py:smoke    the same in seconds

Cap (2306.07915): ViT-B/16 and six decoder blocks, 3 billion web pairs in batches of 8,192; sizes
and rates of its authors' open code (big_vision), whose decoder has no biases and an output matrix
of its own. Their pairs are not public: this reads the open tfds:laion400m. And COCO's captions
(1504.00325), nobody's recipe, from a folder with metadata.jsonl; best with --config.init=DIR of a
run that has a B/16.

  cap_b16, coco_b16

Both are to be given a tokenizer: --config.data.tokenizer=PATH.json (in Cap of 32,000 tokens).
"""

from configs.base import get_base

VARIANTS = ("", "smoke", "cap_b16", "coco_b16")


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="caption")
  if variant == "cap_b16":
    return cap(config)
  if variant == "coco_b16":
    return coco(config)
  return embedded(config, smoke=variant == "smoke")


def embedded(config, smoke: bool):
  """Letters with their Unicode names and styles; tested on font families never seen."""
  config.total_steps, config.eval_every_steps = 1500, 0
  config.expect = "exact match 0.56 +- 0.01 on unseen font families, nearest image in pixels 0.04"
  config.model = dict(name="caption", patch=8, width=128, depth=4, heads=4, mlp_dim=512,
                      pool="mean", positions="sincos2d", text_width=128, text_depth=2, text_heads=4)
  config.data = dict(source="glyphs/letters", batch_size=128, tokenizer="bpe", vocab_size=512,
                     context=16, favour=r"(digit \w+|latin \w+ letter \w),", favour_share=0.4)
  config.augment = dict(affine=dict(degrees=5, translate=0.1, scale=(0.8, 1.15)))  # no italics
  config.optimizer = dict(name="adamw", lr=1e-3, b2=0.95, weight_decay=0.05, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=100)
  config.evals = dict(captions=dict(baselines=("pixels",)))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64, text_width=32, text_depth=1,
                        text_heads=2)
    config.data.update(source="glyphs/digits_16", batch_size=16, vocab_size=300, favour=None)
    config.schedule.warmup_steps = 2
  return config


def b16(config):
  """What the published sizes share: ViT-B/16 at 224 pixels, a decoder of its width."""
  config.dtype = "bfloat16"
  config.log_every_steps = 50
  config.model = dict(name="caption", variant="B/16", pool="mean", scan=True, text_width=768,
                      text_depth=6, text_heads=12)
  config.data = dict(workers=16, tokenizer="tokenizer.json", context=64, on_error="skip")
  config.augment = dict(image_size=224)
  return config


def cap(config):
  """2306.07915 sec. 3, and pretrain.py of its authors' code."""
  config = b16(config)
  config.total_steps, config.checkpoint.every_steps = 366_500, 1000
  config.data.update(source="tfds:laion400m", batch_size=8192)
  config.augment.update(train_crop="squash", eval_squash=True, interpolation="linear")
  config.model.activation = "gelu_tanh"
  # Decay is 1e-4 there, of the schedule without the rate: 1e-4 / lr in our units.
  config.optimizer = dict(name="adafactor", lr=1e-3, weight_decay=0.1, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=10_000)
  return config


def coco(config):
  """Fine-tuning on 20 passes over the images, each time with one of their five captions."""
  config = b16(config)
  config.total_epochs, config.eval_every_epochs, config.checkpoint.every_epochs = 20, 5, 1
  config.model.update(text_dropout=0.1)
  config.method.update(smoothing=0.1, beams=4, length_penalty=0.6)
  config.data.update(source="folder:coco", batch_size=256)
  config.augment.update(crop_area=(0.5, 1.0))
  config.optimizer = dict(name="adamw", lr=1e-4, b2=0.98, weight_decay=0.05, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_epochs=1)
  config.evals = dict(captions={})
  return config
