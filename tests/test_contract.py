"""What grows from new files alone: methods as a newcomer would write them, put into the house.

tests/contract/NAME/ holds the files of each, in the rooms that they would have. They are tests of
the contracts, and no products.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import input_pipeline.augment
import input_pipeline.sources
import train
from trainer import checkpoints, recipe

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "tests" / "contract"


@pytest.fixture
def newcomer(monkeypatch):
  """name -> its config file, once its files are found where the house looks for them."""
  def put(name):
    folder = CONTRACT / name
    monkeypatch.syspath_prepend(str(folder))
    for package in (input_pipeline.sources, input_pipeline.augment):
      inside = folder.joinpath(*package.__name__.split("."))
      monkeypatch.setattr(package, "__path__", [*package.__path__, str(inside)])
    return str(folder / "configs" / f"{name}.py")
  return put


def metrics_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def overlap(image, mask):
  bright = image[..., 0] > 0
  return (bright & (mask == 1)).sum() / (bright | (mask == 1)).sum()


def test_segmentation_whose_masks_move_with_the_image(newcomer, tmp_path):
  config_file, workdir = newcomer("segmentation"), tmp_path / "run"
  built = recipe.build(recipe.load_config(config_file))
  assert {name: (x.shape, str(x.dtype)) for name, x in built.data.spec.items()} == {
    "image": ((32, 20, 20, 1), "uint8"), "mask": ((32, 20, 20), "int32")}  # nothing that none needs
  batch = built.augment.train(jax.random.key(0), next(built.data.train(0, 1)))
  assert overlap(np.asarray(batch["image"]), np.asarray(batch["mask"])) > 0.9

  assert train.main([f"--config={config_file}", f"--workdir={workdir}"]) == 0
  assert metrics_of(workdir)[-1]["eval/overlap/iou"] > 0.9
  run = checkpoints.load_run(workdir)
  record = next(iter(recipe.open_data(built.config, None).splits["test"]))
  ready = run.preprocess(record)
  assert ready["image"].shape == (1, 20, 20, 1) and ready["mask"].shape == (1, 20, 20)
  pred = run.predict("segment", ready)
  assert ((pred == 1) & (ready["mask"] == 1)).sum() / (ready["mask"] == 1).sum() > 0.8


def test_a_method_says_what_data_lacks(newcomer, tmp_path, capsys):
  config_file = newcomer("segmentation")
  assert train.main([f"--config={config_file}", f"--workdir={tmp_path}/run",
                     "--config.data.source=glyphs/digits_16"]) == 1
  said = capsys.readouterr().err
  assert "needs image and mask" in said and "has image and label and text: no mask" in said
  assert not (tmp_path / "run").exists()
  for flag, message in (("augment.mixup=0.8", "augment.mixup = 0.8: must be left out"),
                        ("augment.name=image", "did you mean 'images'")):
    assert train.main([f"--config={config_file}", f"--workdir={tmp_path}/run",
                       f"--config.{flag}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_simsiam_whose_predictor_keeps_its_rate(newcomer, tmp_path):
  config_file, workdir = newcomer("simsiam"), tmp_path / "run"
  built = recipe.build(recipe.load_config(config_file))
  assert built.data.spec["image"].shape == (32, 16, 16, 1)
  assert built.data.spec["image_2"].shape == (32, 12, 12, 1)  # views of two sizes
  assert train.main([f"--config={config_file}", f"--workdir={workdir}"]) == 0
  rows = [row for row in metrics_of(workdir) if "train/loss" in row]
  assert rows[-1]["train/lr_predictor"] == pytest.approx(0.05) and rows[-1]["train/lr"] < 1e-3
  assert rows[-1]["train/loss"] < rows[0]["train/loss"] < 0.1 and rows[-1]["train/std"] > 0.1


def test_a_gan_of_two_rates_and_two_steps_to_one(newcomer, tmp_path):
  config_file = newcomer("gan")
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert train.main([f"--config={config_file}", f"--workdir={whole}"]) == 0
  for steps in (3, 6):
    code = train.main([f"--config={config_file}", f"--workdir={parts}",
                       "--config.checkpoint.every_steps=3", f"--config.total_steps={steps}"])
    if steps == 3:
      assert code == 0
      said = json.loads((parts / "config.json").read_text())
      (parts / "config.json").write_text(json.dumps(said | {"total_steps": 6}))
  runs = [checkpoints.load_run(workdir) for workdir in (whole, parts)]
  jax.tree.map(np.testing.assert_array_equal, runs[0].params, runs[1].params)
  row = [row for row in metrics_of(whole) if "train/loss" in row][-1]
  assert row["train/loss"] == pytest.approx(
    row["train/discriminator/loss"] + row["train/generator/loss"])
  assert row["train/lr"] == pytest.approx(1e-4)
  assert row["train/lr_discriminator"] == pytest.approx(4e-4)
  assert runs[0].predict("sample", {"label": np.arange(5)}).shape == (5, 16, 16, 1)


@pytest.mark.slow
def test_tones_without_an_image_survive_a_kill(tmp_path):
  """As a user does it: the files are put into a copy of the house, and the commands run there."""
  house = tmp_path / "house"
  shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(
    ".*", "tests", "notebooks", "benchmarks", "docs", "runs", "__pycache__"))
  shutil.copytree(CONTRACT / "tones", house, dirs_exist_ok=True,
                  ignore=shutil.ignore_patterns("__pycache__"))
  command = [sys.executable, "train.py", "--config=configs/tones.py"]
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

  def start(workdir):
    return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=house, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

  killed = start("killed")
  while not (house / "killed" / "checkpoints" / "40").exists():
    assert killed.poll() is None, killed.stderr.read()
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  for process in [start("killed"), start("whole")]:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
  script = ("import numpy as np; from trainer.checkpoints import load_run; runs = [load_run(w) for "
            "w in ('killed', 'whole')]; import jax; jax.tree.map(np.testing.assert_array_equal, "
            "runs[0].params, runs[1].params); from input_pipeline.sources.tones import Tones; "
            "r = runs[0].preprocess([Tones('test', 8)[i] for i in range(8)]); "
            "print(runs[0].predict('logits', r).argmax(-1).tolist(), runs[0].class_names[3])")
  said = subprocess.run([sys.executable, "-c", script], cwd=house, env=environment, text=True,
                        capture_output=True)
  assert said.returncode == 0, said.stderr
  assert said.stdout.strip() == f"{[*range(8)]} pitch 3"
  rows = metrics_of(house / "killed")
  assert rows[-1]["eval/classification/top1"] > 0.95
  assert not any("image" in key for row in rows for key in row)
