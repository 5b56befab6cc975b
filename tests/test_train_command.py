"""The commands end to end: every smoke recipe, resuming, bad input, determinism."""

import json
import re
import shutil

import chex
import jax
import numpy as np
import pytest
from runs import curve
from tiers import suite

import evaluate
import train
from trainer import checkpoints, loop, recipe
from trainer.logging import read_metrics

SMOKES = ["configs/mae.py:smoke", "configs/vit.py:smoke", "configs/resnet.py:smoke",
          "configs/moco.py:smoke", "configs/moco.py:smoke_v3", "configs/clip.py:smoke",
          "configs/caption.py:smoke", "configs/bert.py:smoke", "configs/diffusion.py:smoke"]


@pytest.fixture(scope="session")
def run_train(data_dir):
  def run(config, workdir, *flags):
    return train.main([f"--config={config}", f"--workdir={workdir}", f"--data_dir={data_dir}",
                       *flags])
  return run


def parts(config):
  """"configs/NAME.py:VARIANT" -> (NAME, VARIANT)"""
  return re.fullmatch(r"configs/(\w+).py:(\w+)", config).groups()


@pytest.fixture(scope="session", params=suite(SMOKES, 0, 1, 5))
def finished(request, smoke_run, tmp_path_factory):
  """(config, a copy of its run)."""
  copy = tmp_path_factory.mktemp("run") / "run"
  return request.param, shutil.copytree(smoke_run(*parts(request.param)), copy)


def test_run_directory(finished):
  config, workdir = finished
  assert json.loads((workdir / "config.json").read_text())["model"]["num_classes"] == 10
  assert [p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()] == ["6"]
  rows = read_metrics(workdir)
  assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6]
  evaluated = [row["step"] for row in rows if any(k.startswith("eval/") for k in row)]
  if "diffusion" in config:  # samples are drawn at each evaluation and judged at the last
    assert evaluated == [6]
    assert (workdir / "figures" / "sample_step00000003.png").stat().st_size > 5000
  else:
    assert evaluated == [3, 6]
  assert all(isinstance(v, (int, float)) for row in rows for v in row.values())
  assert list((workdir / "tensorboard").iterdir())
  if "mae" in config:
    assert (workdir / "figures" / "reconstruction_step00000006.png").stat().st_size > 5000
    assert {"eval/knn/top1", "eval/knn/untrained/top1"} <= set(rows[-1])


def test_finished_run_is_not_trained_again(finished, run_train, capsys):
  config, workdir = finished
  before = curve(workdir)
  assert run_train(config, workdir) == 0
  assert "continuing from step 6" in capsys.readouterr().out
  assert curve(workdir) == before


def test_load_run_predicts(finished):
  config, workdir = finished
  run = checkpoints.load_run(workdir)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
  batch = {"image": run.preprocess(images)}
  np.testing.assert_allclose(batch["image"], (images / 255 - 0.5) / 0.5, atol=1e-6)
  if "bert" in config:
    batch = {"text": run.tokenize(["digit one, sans", "digit two, serif", "digit three, mono"])}
  if "diffusion" in config:
    image = run.predict("sample", {"label": np.arange(3)})
    assert image.shape == (3, 16, 16, 1) and image.std() > 0
  else:
    features = run.predict("features", batch)
    assert isinstance(features, np.ndarray) and features.shape == (3, 32) and features.std() > 0
  assert run.step == 6 and jax.tree.leaves(run.params)[0].devices() == {jax.devices()[0]}
  if "mae" in config:
    noise = np.random.default_rng(1).random((3, 16))
    out = run.predict("reconstruct", {**batch, "noise": noise})
    removed = np.argsort(np.argsort(noise, 1), 1) >= 6                       # 40% of 16 stay
    np.testing.assert_array_equal(out["mask"], removed)
    chex.assert_shape([out["pred"], out["image"]], [(3, 16, 16), (3, 16, 16, 1)])
    with pytest.raises(ValueError, match="did you mean 'features'"):
      run.predict("featurs", batch)


def test_evaluate_gives_the_numbers_of_training(finished, data_dir, capsys):
  _, workdir = finished
  assert evaluate.main([f"--workdir={workdir}", f"--data_dir={data_dir}", "--json"]) == 0
  numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
  last = read_metrics(workdir)[-1]
  for name, value in numbers.items():
    if name != "step":
      np.testing.assert_allclose(value, last[f"eval/{name}"], rtol=1e-4, err_msg=name)


def test_same_seed_is_bit_identical_and_another_is_not(smoke_run, run_train, tmp_path):
  first, again, other = smoke_run("vit"), tmp_path / "again", tmp_path / "other"
  assert run_train("configs/vit.py:smoke", again) == 0
  assert run_train("configs/vit.py:smoke", other, "--config.seed=1") == 0
  a, b, c = (checkpoints.load_run(workdir).params for workdir in (first, again, other))
  chex.assert_trees_all_equal(a, b)
  assert curve(first) == curve(again) != curve(other)
  assert any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(c)))


def test_interrupted_and_continued_equals_unbroken(run_train, tmp_path):
  flags = ["--config.checkpoint.every_steps=2", "--config.checkpoint.keep=none",
           "--config.ema_decay=0.9"]
  assert run_train(SMOKES[1], tmp_path / "whole", *flags) == 0
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  for step in (4, 6):  # as if killed after step 3, whose line was written
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
  assert run_train(SMOKES[1], tmp_path / "cut", *flags) == 0
  whole, cut = (checkpoints.load_run(tmp_path / x) for x in ("whole", "cut"))
  chex.assert_trees_all_equal(whole.params, cut.params)
  assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


@pytest.mark.parametrize("config", suite(SMOKES, keys=("configs/vit.py:smoke",)))
def test_bfloat16_follows_float32(config, smoke_run, run_train, tmp_path):
  workdir = smoke_run(*parts(config))
  assert run_train(config, tmp_path / "run", "--config.dtype=bfloat16") == 0
  losses = [[row["train/loss"] for row in read_metrics(path) if "train/loss" in row]
            for path in (tmp_path / "run", workdir)]
  # Batch norm over the 16 examples of a smoke run magnifies bfloat16's rounding of 0.4%.
  np.testing.assert_allclose(*losses, rtol=0.05 if "moco" in config else 0.02)
  assert losses[0] != losses[1]
  run = checkpoints.load_run(tmp_path / "run")
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(run.params))


@pytest.mark.parametrize("flags,message", [
  (["--config=configs/mea.py"], "did you mean 'configs/mae.py'"),
  (["--config=configs/mae.py:smok"], "did you mean 'smoke'"),
  (["--config.optimzer.lr=1"], "did you mean 'optimizer'"),
  (["--config.optimizer.weight_decy=1"], "did you mean 'weight_decay'"),
  (["--config.optimizer.name=adamv"], "did you mean 'adamw'"),
  (["--config.optimizer.momentum=0.9"],
   "adamw takes b1, b2, eps, debias; .*momentum=none leaves it out"),
  (["--config.optimizer.lr=abc"], "expected float"),
  (["--config.model.dept=3"], "did you mean 'depth'"),
  (["--config.model.depth=three"], "expected int"),
  (["--config.model.name=vitt"], "did you mean 'vit'"),
  (["--config.model.activation=gelo"], "did you mean 'gelu'"),
  (["--config.model.patch=5"], "model.patch = 5 does not divide the image size 16x16"),
  (["--config.model.heads=3"], "heads = 3 does not divide"),
  (["--config.model.norm=none", "--config.model.qk_norm=true"], "qk_norm = True: expected false"),
  (["--config.method.mask_ratio=1.5"], r"mask_ratio = 1.5: expected a number in \(0, 1\)"),
  (["--config.method.masking=blok"], "did you mean 'block'"),
  (["--config.data.source=glyph/letters"], "did you mean 'glyphs'"),
  (["--config.data.batch_size=10"], "data.batch_size = 10 is not a multiple of 8"),
  (["--config.mesh.data=3"], "must multiply to the 8 devices"),
  (["--config.augment.crop_area=(0,2)"], "augment.crop_area"),
  (["--config.evals.knn.kk=3"], "did you mean 'k'"),
  (["--config.total_epochs=0"], "at least one step"),
  (["--config.schedule.warmup_steps=100"], "longer than the run"),
  (["--config.schedule.name=cosin"], "did you mean 'cosine'"),
  (["--config.ema_decay=1.0"], "ema_decay"),
  (["--config.checkpoint.kep=3"], "did you mean 'keep'"),
  (["--config.checkpoint.on_error=wrn"], "did you mean 'warn'"),
])
def test_bad_config_is_an_error_before_compiling(flags, message, run_train, tmp_path, capsys):
  config = next((f.removeprefix("--config=") for f in flags if f.startswith("--config=")),
                SMOKES[0])
  rest = [f for f in flags if not f.startswith("--config=")]
  assert run_train(config, tmp_path / "run", *rest) == 1
  assert re.search(message, capsys.readouterr().err)
  assert not (tmp_path / "run").exists()


def test_unknown_flag_is_refused(capsys):
  with pytest.raises(SystemExit):
    train.main(["--config=configs/mae.py:smoke", "--wrkdir=x"])
  assert "unknown argument --wrkdir" in capsys.readouterr().err


def test_another_config_in_the_same_workdir_is_refused(finished, run_train, capsys):
  config, workdir = finished
  before = (workdir / "config.json").read_text()
  assert run_train(config, workdir, "--config.optimizer.lr=0.5") == 1
  assert re.search(r"config.optimizer.lr: 0.\d+ -> 0.5", capsys.readouterr().err)
  assert (workdir / "config.json").read_text() == before


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(run_train, tmp_path, capsys):
  flags = ["--config.checkpoint.every_steps=1", "--config.schedule.name=constant",
           "--config.schedule.warmup_steps=0", "--config.optimizer.lr=1e30",
           "--config.optimizer.name=sgd", "--config.optimizer.ns_steps=none"]
  assert run_train(SMOKES[1], tmp_path / "run", *flags) == 1
  error = capsys.readouterr().err
  step = int(re.search(r"not finite at step (\d+)", error).group(1))
  assert step > 1 and f"step {step - 1}, loss" in error
  assert f"last good checkpoint: {step - 1}" in error
  run = checkpoints.load_run(tmp_path / "run")
  assert run.step == step - 1
  assert all(np.isfinite(row["train/loss"]) for row in read_metrics(tmp_path / "run"))


def test_undecodable_image_names_its_file(run_train, tmp_path, capsys):
  from PIL import Image
  for name in "abcdefgh":
    for kind in ("one", "two"):
      folder = tmp_path / "images" / kind
      folder.mkdir(parents=True, exist_ok=True)
      Image.new("L", (16, 16), ord(name)).save(folder / f"{name}.png")
  broken = tmp_path / "images" / "two" / "c.png"
  broken.write_bytes(broken.read_bytes()[:40])
  status = run_train(SMOKES[1], tmp_path / "run", f"--config.data.source=folder:{tmp_path}/images",
                     "--config.data.batch_size=8", "--config.evals.classification=none")
  assert status == 1 and "c.png" in capsys.readouterr().err


def test_none_is_the_choice_of_that_name_where_a_model_has_one():
  """It read as the default once: positions = none were learned ones."""
  config = recipe.load_config("configs/vit.py:smoke", {
    "model.positions": "none", "model.norm": "None", "model.class_token": "none"})
  built = recipe.build(config, data=recipe.stand_in(config))
  assert (built.config.model.positions, built.config.model.norm) == ("none", "none")
  assert built.config.model.class_token is None
  params = loop.abstract_state(built)[0].params
  names = " ".join(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params))
  assert "position" not in names and "norm" not in names and "qkv_kernel" in names


def test_overrides_of_durations_and_new_fields():
  config = recipe.load_config(SMOKES[0], {"total_epochs": "2", "model.depth": "3",
                                          "optimizer.lr": "1"})
  assert "total_steps" not in config and config.total_epochs == 2
  assert config.model.depth == 3 and config.optimizer.lr == 1.0
  assert isinstance(config.optimizer.lr, float)
