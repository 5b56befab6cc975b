"""CLIP end to end: it learns what captions say and nothing else, own folders, a locked tower."""

import json
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from input_pipeline import batches
from trainer.checkpoints import load_run
from trainer.logging import read_metrics


def run_train(workdir, data_dir, *flags, config="configs/clip.py:smoke"):
  return train.main([f"--config={config}", f"--workdir={workdir}", f"--data_dir={data_dir}",
                     *flags])


LEARN = ("--config.total_steps=300", "--config.eval_every_steps=0", "--config.log_every_steps=50",
         "--config.data.batch_size=64", "--config.optimizer.lr=3e-3",
         "--config.schedule.warmup_steps=20", "--config.evals.retrieval=none")


@pytest.fixture(scope="module")
def learned(data_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("learned") / "run"
  assert run_train(workdir, data_dir, *LEARN) == 0
  return workdir


@pytest.mark.slow
def test_digits_are_found_by_name_and_not_by_other_images_captions(learned, data_dir, tmp_path):
  """62 words of text and 443 images: in unseen fonts by name, at chance with captions permuted."""
  assert read_metrics(learned)[-1]["eval/zero_shot/top1"] >= 0.4
  assert run_train(tmp_path / "run", data_dir, *LEARN, "--config.data.permute_text=true") == 0
  last = read_metrics(tmp_path / "run")[-1]
  assert last["eval/zero_shot/chance"] == 0.1
  assert last["eval/zero_shot/top1"] <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 100)


@pytest.mark.slow
def test_own_images_by_class_name(learned, data_dir, tmp_path, capsys):
  data = batches.make("glyphs/digits_16", batch_size=10, data_dir=data_dir)
  batch = next(iter(data.eval("test", 100)))
  names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
  for i, (image, label) in enumerate(zip(batch["image"][:20], batch["label"])):
    Image.fromarray(image[..., 0]).resize((37, 37)).save(tmp_path / f"{i:02}_{names[label]}.png")
  flags = [f"--workdir={learned}", f"--images={tmp_path}/*.png",
           f"--zero_shot.classes={', '.join(names)}", "--zero_shot.template=digit {}, serif"]
  capsys.readouterr()
  assert evaluate.main([*flags, "--json"]) == 0
  rows = json.loads(capsys.readouterr().out)
  assert len(rows) == 20
  for row in rows:
    np.testing.assert_allclose(sum(row[name] for name in names), 1, rtol=1e-5)
  right = [max(names, key=row.get) in row["image"] for row in rows]
  assert np.mean(right) >= 0.3
  assert evaluate.main(flags) == 0
  assert "00_" in capsys.readouterr().out
  assert evaluate.main([flags[0], f"--images={tmp_path}/*.jpg", flags[2]]) == 1
  assert "no such file" in capsys.readouterr().err


def test_names_that_hold_commas_and_files_that_are_no_images(smoke_run, tmp_path, capsys):
  Image.new("L", (16, 16)).save(tmp_path / "a.png")
  (tmp_path / "b.png").write_bytes(b"no image")
  Image.new("L", (16, 16), 255).save(tmp_path / "c.png")
  (tmp_path / "names.txt").write_text("digit one, serif\n\ndigit two, sans\n", encoding="utf-8")
  names = ["digit one, serif", "digit two, sans"]
  flags = [f"--workdir={smoke_run('clip')}", f"--images={tmp_path}/*.png", "--json"]
  capsys.readouterr()
  for said in ([f"--zero_shot.classes={name}" for name in names],
               [f"--zero_shot.classes=@{tmp_path}/names.txt"]):
    assert evaluate.main([*flags, *said]) == 1  # one file could not be read
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [Path(row.pop("image")).name for row in rows] == ["a.png", "c.png"]
    assert all([*row] == names for row in rows)
    assert err.count("error: cannot decode the image") == 1 and "b.png" in err
  assert evaluate.main([*flags, "--zero_shot.classes=@nowhere.txt"]) == 1
  assert "nowhere.txt" in capsys.readouterr().err


def test_the_tokenizer_comes_back_with_the_run(smoke_run):
  run = load_run(smoke_run("clip"))
  ids = run.tokenize(["digit one, serif", "digit two, serif"])
  assert [run.detokenize(row) for row in ids] == ["digit one, serif", "digit two, serif"]
  chex.assert_shape(ids, (2, 24))
  embedding = run.predict("embed_text", {"text": ids})
  np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


def test_another_tokenizer_does_not_continue_a_run(smoke_run, data_dir, tmp_path, capsys):
  run = shutil.copytree(smoke_run("clip"), tmp_path / "run")
  (run / "tokenizer.json").write_text("{}")
  assert run_train(run, data_dir) == 1
  assert "the tokenizer is not that of" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
  """Images of two kinds in several sizes, with captions in metadata.csv."""
  rng, rows = np.random.default_rng(0), ["file_name,text"]
  for i in range(40):
    kind, level = (("dark", 60), ("light", 190))[i % 2]
    pixels = np.clip(rng.normal(level, 20, (*rng.integers(20, 40, 2), 3)), 0, 255)
    (tmp_path / "mine").mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mine" / f"{i}.png")
    rows += [f"{i}.png,a {kind} square", f"{i}.png,\"{kind}, all over\""]
  (tmp_path / "mine" / "metadata.csv").write_text("\n".join(rows))
  return tmp_path / "mine"


def own(folder):
  return [f"--config.data.source=folder:{folder}", "--config.augment.image_size=16",
          "--config.augment.affine=none", "--config.evals.zero_shot=none", "--config.total_steps=3",
          "--config.eval_every_steps=0", "--config.evals.retrieval.split=test",
          "--config.evals.retrieval.unique=.*"]


def test_own_folder_with_captions(folder, data_dir, tmp_path, capsys):
  (folder / "7.png").write_bytes(b"not an image")
  assert run_train(tmp_path / "bad", data_dir, *own(folder)) == 1
  assert "7.png" in capsys.readouterr().err
  assert run_train(tmp_path / "run", data_dir, *own(folder), "--config.data.on_error=skip") == 0
  last = read_metrics(tmp_path / "run")[-1]
  assert {"eval/retrieval/image_to_text/r1", "eval/retrieval/text_to_image/r5"} <= set(last)
  assert list((tmp_path / "run" / "figures").glob("retrieval_*.png"))


@pytest.mark.parametrize("line, message", [
  ("nowhere.png,text", "nowhere.png"), ("3.png,", "empty"), ("3.png", "line")])
def test_a_bad_row_is_named(folder, data_dir, tmp_path, capsys, line, message):
  path = folder / "metadata.csv"
  path.write_text(path.read_text() + "\n" + line)
  assert run_train(tmp_path / "run", data_dir, *own(folder)) == 1
  error = capsys.readouterr().err
  assert message in error and "metadata.csv" in error and "82" in error
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_locked_tower_comes_from_another_run_and_stays(smoke_run, data_dir, tmp_path, capsys):
  """LiT (2111.07991): the image tower of a supervised run, a text tower that learns."""
  locked = (f"--config.init.run={smoke_run('vit')}", "--config.init.into=image",
            "--config.optimizer.frozen=^image/", "--config.method.image_train=false")
  assert run_train(tmp_path / "lit", data_dir, *locked) == 0
  vit, lit = load_run(smoke_run("vit")), load_run(tmp_path / "lit")
  image = dict(vit.params)
  image.pop("head")
  chex.assert_trees_all_equal(lit.params["image"], image)

  capsys.readouterr()
  assert run_train(tmp_path / "wide", data_dir, *locked, "--config.model.width=64") == 1
  assert "does not fit" in capsys.readouterr().err
  assert not (tmp_path / "wide").exists()
  assert run_train(tmp_path / "none", data_dir, "--config.init.run=nowhere") == 1
  assert "nowhere holds no run" in capsys.readouterr().err
