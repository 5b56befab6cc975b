"""Published recipes, by what they see of an image of 480 x 640, beside what their sources say."""

import re
from typing import NamedTuple

import numpy as np
import pytest
from test_recipes import ROWS, built

from input_pipeline import geometry
from trainer import recipe


class Seen(NamedTuple):
  """What a source says: in training a share of the area at least, or a kind; in evaluation the side
  that the shorter one is resized to, or both, squashed."""

  source: str
  train: float | str
  side: int
  interpolation: str
  size: int = 224
  squash: bool = False


def deit3_seen(size):
  return Seen("facebookresearch/deit datasets.py; its pull request 190 tells that 1.0 was meant; "
              "2204.07118 table 1", 0.08, size, "bicubic", size)


MAE_SEEN = Seen("facebookresearch/mae util/datasets.py, main_linprobe.py", 0.08, 256, "bicubic")
INCEPTION = Seen("google-research/big_vision configs/vit_i1k.py: inception_crop; resize_small(256)",
                 0.05, 256, "linear")
MOCO_SEEN = Seen("facebookresearch/moco main_moco.py, main_lincls.py; torchvision's default filter",
                 0.2, 256, "linear")
CLIP_SEEN = Seen("2103.00020 sec. 2.4; openai/CLIP clip/clip.py", "random", 224, "bicubic")
SQUASHED = Seen("google-research/big_vision pp/ops_image.py: resize(224)", "squash", 224, "linear",
                squash=True)
SEEN = {
  r"vit.py:imagenet_s16": deit3_seen(224), r"vit.py:imagenet_[bl]16": deit3_seen(192),
  r"vit.py:imagenet_h14": deit3_seen(154), r"vit.py:.*_(augreg|plain)": INCEPTION,
  r"mae.py:.*": MAE_SEEN._replace(train=0.2), r"finetune.py:imagenet_mae_.*": MAE_SEEN,
  r"moco.py:imagenet_r50_.*": MOCO_SEEN,
  r"moco.py:imagenet_vit_.*": MOCO_SEEN._replace(
    source="facebookresearch/moco-v3 main_moco.py, CONFIG.md: --crop-min=.08", train=0.08),
  r"finetune.py:imagenet_moco_.*": MOCO_SEEN._replace(train=0.08),
  r"resnet.py:imagenet_r18": Seen("pytorch/examples imagenet/main.py", 0.08, 256, "linear"),
  r"resnet.py:imagenet_r50.*": Seen("facebook/fb.resnet.torch datasets/transforms.lua", 0.08, 256,
                                    "bicubic"),
  r"clip.py:vit_.*": CLIP_SEEN, r"clip.py:(siglip|lit)_b16": SQUASHED,
  r"caption.py:cap_b16": SQUASHED,
  r"finetune.py:imagenet_vit_.*_384": Seen(
    "google-research/vision_transformer vit_jax/input_pipeline.py", 0.05, 384, "linear", 384, True),
}


@pytest.mark.parametrize("name", [name for name in ROWS if "bert" not in name])
def test_what_is_seen(name):
  told = [seen for pattern, seen in SEEN.items() if re.fullmatch(f"configs/{pattern}", name)]
  (row,), (config, *_), (h, w) = told, built(name), (480, 640)
  rng = np.random.default_rng(0)
  for view in recipe.make_views(config):
    assert (view.image_size, view.interpolation) == ((row.size,) * 2, row.interpolation)
    cut = geometry.for_evaluation(view, h, w)
    rows, columns = (row.side, row.side) if row.squash else (row.side, w * row.side // h)
    top, left = (round((side - row.size) / 2) for side in (rows, columns))
    assert cut.size == view.image_size and cut.window is None
    np.testing.assert_allclose(cut.box, (top * h / rows, left * w / columns, row.size * h / rows,
                                         row.size * w / columns))
    boxes = np.array([geometry.for_training(view, rng, h, w).box for _ in range(500)])
    if row.train == "squash":
      assert (boxes == (0, 0, h, w)).all()
    elif row.train == "random":
      np.testing.assert_allclose(boxes[:, 2:], [(h, h)] * 500, rtol=0.01)
      assert boxes[:, 1].min() < 5 and boxes[:, 1].max() > w - h - 5
    else:
      areas, ratios = boxes[:, 2] * boxes[:, 3] / (h * w), boxes[:, 3] / boxes[:, 2]
      assert row.train - 0.003 < areas.min() < row.train + 0.02 and areas.max() > 0.95
      np.testing.assert_allclose((ratios.min(), ratios.max()), (3 / 4, 4 / 3), rtol=0.02)
