"""A user's own folder of images of several sizes: trains and evaluates with one command."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import evaluate
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


@pytest.mark.slow
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


def test_images_of_many_sizes_need_a_size_where_nothing_settles_it(folder, tmp_path, capsys):
  assert train.main(["--config=configs/vit.py:smoke", f"--workdir={tmp_path / 'run'}",
                     f"--config.data.source=folder:{folder}", "--config.data.batch_size=8",
                     "--config.own_data=false"]) == 1
  assert "augment.image_size" in capsys.readouterr().err


def own_run(workdir, source, *flags):
  return train.main([
    "--config=configs/vit.py:smoke", f"--workdir={workdir}",
    f"--config.data.source=folder:{source}", "--config.data.batch_size=8",
    "--config.augment.image_size=16", "--config.augment.affine=none", "--config.total_steps=2",
    "--config.eval_every_steps=0", "--config.schedule.warmup_steps=0", *flags])


def config_of(workdir):
  return json.loads((workdir / "config.json").read_text())["data"]


def test_one_split_alone_is_evaluated_on_a_share_of_it(folder, tmp_path, caplog, capsys):
  source, run = folder / "train", tmp_path / "run"
  assert own_run(run, source) == 0
  assert "2 of its 24 images are held out of training" in caplog.text
  assert config_of(run)["held_out"] == 0.1
  assert 0 <= read_metrics(run)[-1]["eval/classification/top1"] <= 1
  assert own_run(run, source, "--config.eval_every_steps=1") == 0  # the same command goes on
  capsys.readouterr()
  assert evaluate.main([f"--workdir={run}", "--json"]) == 0
  again = json.loads(capsys.readouterr().out)["classification/top1"]
  assert again == read_metrics(run)[-1]["eval/classification/top1"]
  other = [f"--workdir={run}", f"--config.data.source=folder:{folder / 'train'}/", "--json"]
  assert evaluate.main(other) == 1
  assert "--config.data.eval_split=train" in capsys.readouterr().err
  assert evaluate.main([*other, "--config.data.eval_split=train"]) == 0


def test_a_run_from_before_a_share_was_held_out_goes_on_with_all_images(folder, tmp_path):
  source, run = folder / "train", tmp_path / "run"
  flags = ["--config.evals.classification=none"]
  assert own_run(run, source, "--config.data.held_out=none", *flags) == 0
  config = json.loads((run / "config.json").read_text())
  del config["data"]["held_out"]  # as code before wrote it
  (run / "config.json").write_text(json.dumps(config))
  assert own_run(run, source, *flags) == 0
  assert "held_out" not in config_of(run)
  assert own_run(run, source, "--config.data.held_out=0.1", *flags) == 1


def test_classes_of_other_data_are_the_runs_by_name(folder, tmp_path, capsys, caplog):
  """Without the class that comes first, labels were counted anew once: top-1 was 0."""
  run, other = tmp_path / "run", tmp_path / "other"
  assert own_run(run, folder, "--config.total_steps=40", "--config.optimizer.lr=3e-3") == 0
  for split in ("train", "test"):
    shutil.copytree(folder / split / "light", other / split / "light")

  def evaluated():
    capsys.readouterr()
    code = evaluate.main([f"--workdir={run}", f"--config.data.source=folder:{other}", "--json"])
    said = capsys.readouterr()
    return json.loads(said.out)["classification/top1"] if code == 0 else said.err

  own, there = read_metrics(run)[-1]["eval/classification/top1"], evaluated()
  assert own >= 0.9 and there >= 0.8
  (run / "data.json").rename(run / "kept.json")
  assert evaluated() <= 0.2  # as older runs have it, whose classes have no names
  assert "the run has 2 classes, whose names it does not know; the data has 1" in caplog.text
  (run / "kept.json").rename(run / "data.json")
  for split in ("train", "test"):
    (other / split / "light").rename(other / split / "lihgt")
  assert ("the run knows its 2 classes by name, and not 'lihgt'; allowed: dark, light; did you "
          "mean 'light'?") in evaluated()
