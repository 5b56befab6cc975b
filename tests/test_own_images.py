"""A user's own folder of images of several sizes: trains and evaluates with one command."""

import numpy as np
import pytest
from PIL import Image

import train
from trainer.logging import read_metrics


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("test", 5)):
    for kind, level in (("dark", 60), ("light", 190)):
      path = tmp_path / "images" / split / kind
      path.mkdir(parents=True)
      for i in range(count):
        height, width = rng.integers(20, 40, 2)
        pixels = np.clip(rng.normal(level, 20, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.jpg")
  return tmp_path / "images"


def test_colour_images_of_many_sizes(folder, tmp_path):
  assert train.main([
    "--config=configs/vit.py:smoke", f"--workdir={tmp_path / 'run'}",
    f"--config.data.source=folder:{folder}", "--config.data.batch_size=8",
    "--config.augment.image_size=16", "--config.augment.crop_area=(0.5,1)",
    "--config.augment.affine=none", "--config.augment.mixup=0.2", "--config.total_steps=40",
    "--config.eval_every_steps=20", "--config.optimizer.lr=3e-3"]) == 0
  rows = read_metrics(tmp_path / "run")
  assert rows[-1]["eval/classification/top1"] >= 0.9
  assert "eval/classification/top5" not in rows[-1]  # two classes


def test_images_of_many_sizes_need_a_size(folder, tmp_path, capsys):
  assert train.main(["--config=configs/vit.py:smoke", f"--workdir={tmp_path / 'run'}",
                     f"--config.data.source=folder:{folder}", "--config.data.batch_size=8"]) == 1
  assert "augment.image_size" in capsys.readouterr().err
