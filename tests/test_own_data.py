"""Own data by one flag: what a recipe says of its own data is left out, the rest is settled."""

import numpy as np
import pytest
from PIL import Image

import train
from trainer import recipe
from trainer.logging import read_metrics


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
  for split, count in (("train", 20), ("test", 4)):
    for digit in "01":
      (root / "digits" / split / digit).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(
          root / "digits" / split / digit / f"{i}.png")
  for folder in ("photos/train/red", "photos/train/blue", "photos/test/red", "photos/test/blue",
                 "pairs/train", "pairs/test"):
    (root / folder).mkdir(parents=True)
    for i in range(20 if "train" in folder else 4):
      height, width = rng.integers(60, 120, 2)
      Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
        root / folder / f"{i}.png")
    if "pairs" in folder:
      rows = [f"{path.name},a picture of number {path.stem}" for path in (root / folder).iterdir()]
      (root / folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
  return root


def built(folders, name, folder, **flags):
  return recipe.build(recipe.load_config(f"configs/{name}.py", {
    "data.source": f"folder:{folders / folder}", **flags}))


@pytest.mark.parametrize("name,folder,size,evals", [
  ("vit", "digits", (32, 32), {"classification"}),  # patches of 8 do not divide 28 pixels
  ("vit", "photos", (64, 64), {"classification"}),
  ("resnet", "digits", (28, 28), {"classification"}),
  ("mae", "digits", (28, 28), {"knn", "linear_probe", "reconstruction"}),
  ("mae", "pairs", (32, 32), {"reconstruction"}),
  ("moco", "photos", (64, 64), {"knn", "linear_probe"}),
  ("moco", "pairs", (64, 64), set()),
  ("clip", "pairs", (64, 64), {"retrieval"}),
  ("caption", "pairs", (64, 64), {"captions"}),
  ("diffusion", "photos", (32, 32), {"samples"})])
def test_every_recipe_takes_any_folder(folders, caplog, name, folder, size, evals):
  made = built(folders, name, folder)
  assert made.config.augment.image_size == size
  assert {*made.config.evals} == evals and not made.config.expect
  assert made.config.data.batch_size == made.data.spec["image"].shape[0] == 32 or (
    folder == "pairs" and made.config.data.batch_size == 16)
  said = caplog.text
  assert "own data: data.batch_size" in said and "training examples" in said
  assert ("is left out: evals." in said) == (folder == "pairs" and name in ("mae", "moco", "clip"))
  assert ("augment.image_size" in said) == (size != (28, 28))


def test_what_the_flags_say_is_not_settled(folders):
  made = built(folders, "vit", "photos", **{"augment.image_size": "40", "data.batch_size": "8"})
  assert made.config.model.image_size == (40, 40) and made.config.data.batch_size == 8
  with pytest.raises(ValueError, match="batch_size=64 is larger than the 40 examples"):
    built(folders, "vit", "photos", **{"data.batch_size": "64"})
  with pytest.raises(ValueError, match="evals.classification.splitt"):
    built(folders, "vit", "photos", **{"evals.classification.splitt": "test"})
  own = recipe.load_config("configs/clip.py", {"data.source": "glyphs/digits_16"})
  assert not own.own_data and own.data.favour  # another set of glyphs has what glyphs have


@pytest.mark.slow
def test_clip_trains_by_one_flag(folders, tmp_path, capsys):
  """The words of the report: favour, a setting of the embedded data, stopped it."""
  assert train.main(["--config=configs/clip.py:smoke", f"--workdir={tmp_path}/run",
                     f"--config.data.source=folder:{folders}/pairs"]) == 0
  assert 0 <= read_metrics(tmp_path / "run")[-1]["eval/retrieval/image_to_text/r1"] <= 1
