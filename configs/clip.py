"""Contrastive language-image pre-training.

  python train.py --config=configs/clip.py           embedded letters and their names, minutes on
                                                     two CPU cores
  python train.py --config=configs/clip.py:smoke     the same in seconds

CLIP (2103.00020): batch 32,768, 32 epochs of 400 million pairs, appendix F's tables 18 to 20.
Published zero-shot ImageNet top-1 (table 11): B/32 63.2, B/16 68.6, L/14 75.3.

  vit_b32, vit_b16, vit_l14

SigLIP (2303.15343), B/16 at 224 pixels, on 3 billion pairs in batches of 32,768 (its tables 5 to 7:
69.9 to 70.1 on the authors' own pairs); and LiT (2111.07991): a locked image tower,
--config.init.run=DIR of a B/16 that configs/vit.py trained, and a text tower that learns to read it
(sec. 4 and appendix C: 900 million pairs seen).

  siglip_b16, lit_b16

The papers' pairs are not public: these read the open tfds:laion400m. CLIP's tokenizer.json, and one
of 32,000 tokens for the other two, are to be given: --config.data.tokenizer=PATH.json.
"""

from configs.base import get_base

CLIP = {"vit_b32": ("CLIP-B/32", 5e-4), "vit_b16": ("CLIP-B/16", 5e-4),
        "vit_l14": ("CLIP-L/14", 4e-4)}
# "resize(224)" of big_vision (pp/ops_image.py), in training and evaluation; pixels in [-1, 1].
SQUASH = dict(image_size=224, train_crop="squash", eval_squash=True, interpolation="linear")
VARIANTS = ("", "smoke", *CLIP, "siglip_b16", "lit_b16")
STYLES = ("sans", "serif", "mono", "bold sans", "bold serif", "bold mono", "italic sans",
          "italic serif", "italic mono")
NAMES = (*(f"digit {name}" for name in ("zero", "one", "two", "three", "four", "five", "six",
                                        "seven", "eight", "nine")),
         *(f"latin {case} letter {letter}" for case in ("capital", "small")
           for letter in "abcdefghijklmnopqrstuvwxyz"))


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="clip")
  if variant in CLIP:
    return clip(config, *CLIP[variant])
  if variant == "siglip_b16":
    return siglip(config)
  if variant == "lit_b16":
    return lit(config)
  return embedded(config, smoke=variant == "smoke")


def embedded(config, smoke: bool):
  """Letters with their Unicode names; tested on font families and on names never seen."""
  config.total_steps, config.eval_every_steps = 1500, 0
  config.expect = "zero-shot 0.72 +- 0.01, R@1 of unseen names 0.73 and 0.86 +- 0.02"
  config.model = dict(name="clip", patch=8, width=128, depth=4, heads=4, mlp_dim=512, pool="mean",
                      positions="sincos2d", embed_dim=128, text_width=128, text_depth=2,
                      text_heads=4)
  config.data = dict(source="glyphs/letters", batch_size=128, tokenizer="bpe", vocab_size=512,
                     context=24, favour=r"(digit \w+|latin \w+ letter \w),", favour_share=0.4)
  config.augment = dict(affine=dict(degrees=5, translate=0.1, scale=(0.8, 1.15), shear=12))
  config.optimizer = dict(name="adamw", lr=1e-3, b2=0.95, weight_decay=0.05, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=100)
  config.evals = dict(
    zero_shot=dict(classes=NAMES, templates=tuple(f"{{}}, {style}" for style in STYLES)),
    retrieval=dict(split="unseen_names", unique="[^,]*"))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64, embed_dim=16, text_width=32,
                        text_depth=1, text_heads=2)
    config.data.update(source="glyphs/digits_16", batch_size=16, vocab_size=300, favour=None)
    config.evals.zero_shot.update(classes=NAMES[:10], templates=("{}, sans",))
    config.schedule.warmup_steps = 2
  return config


def web_pairs(config, variant: str, batch_size: int):
  """What the published recipes share: image-text pairs of the web, streamed."""
  config.dtype = "bfloat16"
  config.log_every_steps, config.checkpoint.every_steps = 50, 1000
  config.model = dict(name="clip", variant=variant, scan=True)
  config.data = dict(source="tfds:laion400m", batch_size=batch_size, workers=16,
                     tokenizer="tokenizer.json", on_error="skip")
  config.method.chunk = 2048
  return config


def clip(config, variant: str, lr: float):
  """Appendix F; the only augmentation is a random square of the resized image."""
  config = web_pairs(config, variant, batch_size=32768)
  config.total_examples = 32 * 400_000_000
  config.data.update(context=77)
  # As clip/model.py starts; its image tower's blocks as PyTorch's.
  width = 1024 if variant.endswith("L/14") else 768
  config.model.update(kernel_init="torch", patch_init="torch", token_init=width**-0.5,
                      position_init=width**-0.5)
  config.augment = dict(image_size=224, train_crop="random", eval_crop=1.0,
                        mean=(0.48145466, 0.4578275, 0.40821073),
                        std=(0.26862954, 0.26130258, 0.27577711))
  config.optimizer = dict(name="adamw", lr=lr, b2=0.98, eps=1e-6, weight_decay=0.2,
                          decay=r"(kernel|embedding|table|position)$")  # all but gains and biases
  config.schedule = dict(name="cosine", warmup_steps=2000)
  return config


def siglip(config):
  """2303.15343: table 6's best rate and decay at this batch, appendix A's beta, E's warm-up.

  Its decay, 3e-5, is of the schedule without the rate, as in big_vision, its authors' code: 3e-5 /
  lr in our units. A text has the 64 tokens of the released models.
  """
  config = web_pairs(config, "SigLIP-B/16", batch_size=32768)
  config.total_examples = 3_000_000_000
  config.method.update(loss="sigmoid", max_logit_scale=None)
  config.data.update(context=64)
  config.augment = dict(SQUASH)
  config.optimizer = dict(name="adafactor", lr=3e-4, beta2_cap=0.95, weight_decay=0.1,
                          clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_examples=300_000_000)
  return config


def lit(config):
  """2111.07991 appendix C: the image tower stays as it was pre-trained; nothing decays."""
  config = web_pairs(config, "B/16", batch_size=16384)
  config.total_steps = 55_000
  config.init = dict(run="", into="image")
  config.model.update(pool="cls", embed_dim=768, text_width=768, text_depth=12, text_heads=12,
                      text_pool="last", text_activation="gelu_tanh", text_clip_init=False,
                      init_scale=10.0, project_image=False)
  config.method.image_train = False
  config.data.update(context=16)
  config.augment = dict(SQUASH)
  config.optimizer = dict(name="adafactor", lr=1e-3, clip_norm=1.0, frozen="^image/")
  config.schedule = dict(name="cosine", warmup_steps=10_000)
  return config
