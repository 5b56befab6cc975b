"""Folders as people have them: names of splits, links, droppings, spellings, other kinds."""

import json
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline import batches, folders, records, splits
from input_pipeline.metadata import read_metadata
from input_pipeline.sources import folder as folder_source
from input_pipeline.sources import open_source
from trainer import recipe
from trainer.config import HELD_OUT, hold_out

ROOT = Path(__file__).parent.parent
NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


def write(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (7, 7, 7)).save(path)


def of_classes(root, *folders, classes=("green", "red"), count=2):
  write(root, *(f"{folder}/{name}/{i}.png" for folder in folders for name in classes
                for i in range(count)))


def info_of(root, **options):
  return open_source(f"folder:{root}", **options).info


def files(split):
  return [Path(record["image"]).name for record in split]


# Splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, known", [
  (("train", "valid"), {"train", "val"}), (("Train", "Test"), {"train", "test"}),
  (("TRAIN", "dev"), {"train", "val"}), (("Training", "testing"), {"train", "test"}),
  (("train", "Validation"), {"train", "validation"}), (("training",), {"train"}),
  (("train", "valid", "test"), {"train", "val", "test"}), (("Test",), {"test"}),
  (("val", "test"), {"test", "val"})])
def test_splits_go_by_any_of_their_names(tmp_path, names, known):
  of_classes(tmp_path, *names)
  info = info_of(tmp_path)
  assert info.class_names == ("green", "red")
  assert info.num_examples == dict.fromkeys(known, 4)


@pytest.mark.parametrize("names", [
  ("train/red/a.png", "holdout/red/a.png"), ("valid/red/a.png", "mine/red/a.png", "b/red/a.png"),
  ("train/a.png", "bus/a.png"), ("Train/metadata.csv.png/a.png", "b/a.png", "c/a.png")])
def test_what_only_looks_like_splits_is_never_taken_for_classes(tmp_path, names):
  write(tmp_path, *names)
  first, *others = dict.fromkeys(name.split("/")[0] for name in names)
  with pytest.raises(ValueError, match=f"named like splits: '{first}'; not: .*'{others[0]}'.*"
                                       "rename those that are.*If all of these are classes"):
    info_of(tmp_path)


def test_a_class_may_be_named_like_a_split(tmp_path, caplog):
  write(tmp_path, "train/a.png", "bus/a.png", "car/a.png")
  assert info_of(tmp_path).class_names == ("bus", "car", "train")
  assert "'train' taken for classes, as the 2 folders beside are" in caplog.text
  write(tmp_path / "b", "train/train/a.png", "train/bus/a.png")
  assert info_of(tmp_path / "b").class_names == ("bus", "train")


def test_two_names_of_one_split_are_an_error(tmp_path):
  of_classes(tmp_path, "train", "valid", "Dev")
  with pytest.raises(ValueError, match="'Dev' and 'valid' are both names of the split 'val'"):
    info_of(tmp_path)


def test_what_is_left_out_beside_splits_is_told(tmp_path, caplog):
  of_classes(tmp_path, "train", "test")
  info_of(tmp_path)
  assert not caplog.messages
  write(tmp_path, "extra/a.png", "b.png", "c.png")
  (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,x")
  assert info_of(tmp_path).num_examples == {"train": 4, "test": 4}
  assert "left out, beside the splits 'test', 'train': 'extra', 'metadata.csv', 2 images" in (
    caplog.text)


def test_a_folder_around_the_splits_is_told(tmp_path, caplog):
  of_classes(tmp_path, "archive/train", "archive/test")
  info_of(tmp_path)
  assert "'archive' is taken for a class, but holds 'test', 'train': is folder:" in caplog.text


def test_a_run_before_valid_was_a_split_goes_on(tmp_path):
  """Its fingerprint was of `train` and `test`."""
  for split in ("train", "test"):
    write(tmp_path, f"{split}/red/0.ppm", f"{split}/green/0.ppm")  # of 83 bytes each
  before = info_of(tmp_path).fingerprint
  assert before == "836bf7533043dd2a"  # what the code before wrote of these files
  of_classes(tmp_path, "valid")
  info = info_of(tmp_path)
  assert info.fingerprint == before and info.num_examples["val"] == 4
  assert batches.make(f"folder:{tmp_path}", batch_size=2).eval_split == "test"


# A share held out --------------------------------------------------------------------------------


def test_a_share_of_each_class_is_held_out_whatever_the_order(tmp_path, caplog):
  of_classes(tmp_path, ".", classes=("a", "b"), count=30)
  write(tmp_path, "single/x.png")
  whole = info_of(tmp_path)
  parts, info = open_source(f"folder:{tmp_path}", held_out=0.1)
  assert info.num_examples == {"train": 55, "test": 6} and info.class_names == whole.class_names
  assert "6 of its 61 images are held out" in caplog.text and "held_out=0" in caplog.text
  labels = [record["label"] for record in parts["test"]]
  assert labels == [0, 0, 0, 1, 1, 1]  # and the only one of a class is trained on
  paths = [{record["image"] for record in parts[split]} for split in ("train", "test")]
  assert len(paths[0] | paths[1]) == 61 and not paths[0] & paths[1]
  assert info.fingerprint != whole.fingerprint
  assert open_source(f"folder:{tmp_path}", held_out=0.1).info == info
  held = [files(parts["test"])[i:i + 3] for i in (0, 3)]
  assert held[0] != held[1] and held[0] != ["0.png", "1.png", "10.png"]  # not the first by name
  rows = [{"file": f"{i}.png"} for i in range(20)]
  first, second = (folder_source.hold_out(order, 0.25, tmp_path)["test"]
                   for order in (rows, rows[::-1]))
  assert len(first) == 5 and sorted(map(str, first)) == sorted(map(str, second))
  rows = [{"file": f"{i}.png", "label": min(i, 10)} for i in range(15)]
  held = folder_source.hold_out(rows, 0.5, tmp_path)["test"]
  assert [row["label"] for row in held] == [10] * 4


@pytest.mark.parametrize("held_out", [None, 0])
def test_nothing_is_held_out_unless_asked_for(tmp_path, held_out, caplog):
  of_classes(tmp_path / "a", ".")
  assert info_of(tmp_path / "a", held_out=held_out).num_examples == {"train": 4}
  of_classes(tmp_path / "b", "train", "test")
  assert info_of(tmp_path / "b", held_out=0.5) == info_of(tmp_path / "b")
  assert not caplog.messages


def test_few_images_and_bad_shares(tmp_path):
  write(tmp_path, "a.png")
  assert info_of(tmp_path, held_out=0.1).num_examples == {"train": 1}
  write(tmp_path, "b.png")
  assert info_of(tmp_path, held_out=0.1).num_examples == {"train": 1, "test": 1}
  with pytest.raises(ValueError, match=r"data.held_out=1: expected a number in \[0, 1\)"):
    info_of(tmp_path, held_out=1)


def test_a_run_holds_out_what_it_began_with(tmp_path):
  def share(workdir, **data):
    config = recipe.load_config("configs/vit.py:smoke")
    config.data.update({"source": "folder:mine", **data})
    given = config.data.to_dict()
    held = hold_out(config, workdir).data.get("held_out")
    assert config.data.to_dict() == given
    return held

  new, before = tmp_path / "new", tmp_path / "before"
  assert share(new) == HELD_OUT == 0.1
  assert share(new, held_out=0.3) == 0.3 and share(new, held_out=None) is None
  assert share(new, eval_split="train") is share(new, train_split="train[:9]") is None
  assert share(new, source="glyphs") is share(new, latents="mean") is None
  before.mkdir()
  (before / "config.json").write_text(json.dumps({"data": {"source": "folder:mine"}}))
  assert share(before) is None
  (before / "config.json").write_text(json.dumps({"data": {"held_out": 0.2}}))
  assert share(before) == 0.2


def test_no_split_to_evaluate_on_is_told(tmp_path):
  of_classes(tmp_path, ".")
  data = batches.make(f"folder:{tmp_path}", batch_size=2)
  with pytest.raises(ValueError, match="has no split test or val to evaluate on, but train: "
                                       "data.eval_split=train evaluates on that, data.held_out"):
    data.eval()


# Class names -------------------------------------------------------------------------------------


def test_class_names_have_one_order_whatever_the_hash_seed(tmp_path):
  write(tmp_path, *(f"{name}/a.png" for name in ("1", "01", "10", "001", "2")))
  code = (f"from input_pipeline.sources import open_source; "
          f"print(open_source('folder:{tmp_path}').info.class_names)")
  said = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
          for seed in "12"}
  assert said == {"('001', '01', '1', '2', '10')\n"}


def test_a_class_is_one_in_either_spelling(tmp_path):
  write(tmp_path, f"train/{NFD}/a.png", "train/z/a.png", f"test/{NFC}/a.png", "test/z/a.png")
  parts, info = open_source(f"folder:{tmp_path}")
  assert info.class_names == (NFC, "z")  # as the first spelling sorts: "e" goes before "z"
  assert [record["label"] for record in parts["test"]] == [1, 0]


@pytest.mark.parametrize("there, said", [(NFD, NFC), (NFC, NFD)])
def test_metadata_find_a_file_in_either_spelling(tmp_path, there, said):
  write(tmp_path, f"{there}/{there}.png")
  (tmp_path / "metadata.csv").write_text(f"file_name,label\n{said}/{said}.png,{there}\n"
                                         f"{there}/{there}.png,{said}\n", encoding="utf-8")
  parts, info = open_source(f"folder:{tmp_path}")
  assert info.class_names == (NFC,) and info.num_examples == {"train": 1}
  assert Path(parts["train"][0]["image"]).is_file()


class Held:
  """A `reader.Reader` as far as `with_classes` looks."""

  def __init__(self, names, labels=(0, 1, -1), classes=None):
    self.source = "folder:other"
    self.splits = {"train": folder_source._Records({"label": i, "name": str(i)} for i in labels)}
    self.info = records.describe(records.image_features((4, 4, 3), classes or len(names)),
                                 {"train": 3}, "", names)


def test_labels_are_counted_as_the_run_counts_them():
  reader = Held((NFD, "red"))
  got = splits.with_classes(reader, ("blue", NFC, "red"))
  assert [record["label"] for record in got.splits["train"]] == [1, 2, -1]
  assert [record["label"] for record in got.splits["train"].__getitems__([1, 0])] == [2, 1]
  assert got.info.class_names == ("blue", NFC, "red") and got.info.num_classes == 3
  assert got.info.features["label"].classes == 3
  assert [record["label"] for record in reader.splits["train"]] == [0, 1, -1]
  assert splits.with_classes(reader, (NFD, "red")) is reader


def test_classes_that_the_run_does_not_know_are_named():
  with pytest.raises(ValueError, match="folder:other.*the run knows its 2 classes by name, and not "
                                       "'gren', 'x'; allowed: green, red; did you mean 'green'"):
    splits.with_classes(Held(("gren", "red", "x")), ("green", "red"))
  with pytest.raises(ValueError, match="by name, green, red; the 2 classes here have no names"):
    splits.with_classes(Held((), classes=2), ("green", "red"))


# Links and droppings -----------------------------------------------------------------------------


def test_links_out_of_the_folder_are_refused_unless_allowed(tmp_path):
  root, out = tmp_path / "data", tmp_path / "out"
  write(root, "cat/a.png")
  write(out, "b.png", "deep/c.png")
  (root / "cat/b.png").symlink_to(out / "b.png")
  with pytest.raises(ValueError, match="b.png leads out of .*--config.data.follow_links=true"):
    info_of(root)
  (root / "dog").symlink_to(out / "deep")
  with pytest.raises(ValueError, match="dog leads out of .*--config.data.follow_links=true"):
    info_of(root)
  data = batches.make(f"folder:{root}", batch_size=3, follow_links=True)
  assert data.info.num_examples == {"train": 3} and data.info.class_names == ("cat", "dog")
  assert next(data.train(0, 1))["image"].shape == (3, 4, 6, 3)


@pytest.mark.parametrize("link, target", [
  ("data/dog", "data/cat"), ("data/dog", "."), ("data/dog", "data"), ("out/loop", "out"),
  ("out/loop", "data/cat")])
def test_links_to_images_that_are_read_already_are_refused(tmp_path, link, target):
  write(tmp_path, "data/cat/a.png", "out/b.png")
  if link.startswith("out"):
    (tmp_path / "data/out").symlink_to(tmp_path / "out")
  (tmp_path / link).symlink_to(tmp_path / target)
  with pytest.raises(ValueError, match="links to a folder, whose images would be read twice"):
    info_of(tmp_path / "data", follow_links=True)


def test_a_link_to_what_is_around_images_that_are_read_is_refused(tmp_path):
  write(tmp_path, "data/cat/a.png", "out/deep/b.png")
  (tmp_path / "data/dog").symlink_to(tmp_path / "out/deep")
  assert info_of(tmp_path / "data", follow_links=True).num_examples == {"train": 2}
  (tmp_path / "data/owl").symlink_to(tmp_path / "out")
  with pytest.raises(ValueError, match="owl links to a folder, whose images would be read twice"):
    info_of(tmp_path / "data", follow_links=True)


def test_metadata_follow_links_where_allowed(tmp_path):
  write(tmp_path, "out/a.png", "data/b.png")
  (tmp_path / "data/images").symlink_to(tmp_path / "out")
  (tmp_path / "data/metadata.csv").write_text("file_name,text\nimages/a.png,x\nb.png,y")
  with pytest.raises(ValueError, match="images leads out of .*follow_links=true"):
    info_of(tmp_path / "data")
  assert info_of(tmp_path / "data", follow_links=True).num_examples == {"train": 2}
  (tmp_path / "data/metadata.csv").write_text("file_name,text\n../out/a.png,x")
  with pytest.raises(ValueError, match="a.png leads out of .*lie below it"):
    info_of(tmp_path / "data", follow_links=True)


def test_droppings_are_passed_over(tmp_path, caplog):
  of_classes(tmp_path, ".")
  clean = info_of(tmp_path)
  write(tmp_path, "@eaDir/a.png", "red/@eaDir/0.png/thumb.jpg", "__MACOSX/red/0.png",
        ".thumbnails/a.png", "red/._0.png", "#recycle/old.png", "$RECYCLE.BIN/x.png")
  (tmp_path / "red/Thumbs.db").write_bytes(b"")
  assert info_of(tmp_path) == clean and not caplog.messages


def test_pictures_of_other_kinds_are_told(tmp_path, caplog):
  write(tmp_path, "a.png")
  for name in ("b.HEIC", "c.heic", "d.cr2", "notes.txt"):
    (tmp_path / name).write_bytes(b"")
  assert info_of(tmp_path).num_examples == {"train": 1}
  assert "passed over 1 .cr2, 2 .heic, which are not read: convert them" in caplog.text
  (tmp_path / "a.png").unlink()
  with pytest.raises(ValueError, match="no images in .*; passed over 1 .cr2, 2 .heic"):
    info_of(tmp_path)


def test_avif_is_read_where_pillow_can_or_told(tmp_path, monkeypatch):
  if ".avif" in folder_source.EXTENSIONS:
    write(tmp_path, "a.avif")
    assert info_of(tmp_path).image_shape == (4, 6, 3)
  else:
    (tmp_path / "a.avif").write_bytes(b"")
  monkeypatch.setattr(folder_source, "EXTENSIONS", (".png",))
  with pytest.raises(ValueError, match="passed over 1 .avif.*needs Pillow 11.3"):
    info_of(tmp_path)


# Metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, match", [
  (b"file_name, text\na.png,x", "it has: 'file_name', ' text'. ' text' is not 'text': .*no spaces"),
  (b"File_Name,text\na.png,x", "'File_Name' is not 'file_name': .*no capitals"),
  (b"file_name;text\na.png;x", "it has: 'file_name;text'. Separated by ';'[?] .*by commas"),
  (b"file_name\ttext\na.png\tx", r"Separated by '\\t'[?] Columns are separated by commas"),
  ("file_name,text\na.png,x".encode("utf-16"), r"not UTF-8 \(UTF-16 by its first bytes"),
  ("file_name,text\na.png,x".encode("utf-16-be"), r"not UTF-8 \(UTF-16 or UTF-32 by its first"),
  (b"file_name,text\nsub\\a.png,x", "no such file .*separated by '/'")])
def test_what_is_wrong_with_a_header_is_shown(tmp_path, content, match):
  write(tmp_path, "a.png")
  (tmp_path / "metadata.csv").write_bytes(content)
  with pytest.raises(ValueError, match=match):
    info_of(tmp_path)


def test_a_column_that_is_almost_one_is_told(tmp_path, caplog):
  write(tmp_path, "a.png")
  (tmp_path / "metadata.csv").write_text("file_name,label, text\na.png,0,x")
  assert "text" not in info_of(tmp_path).features
  assert "line 1: ' text' is not 'text', and is not read" in caplog.text


def test_rows_are_read_without_asking_the_disk_for_each(tmp_path, monkeypatch):
  names = [f"images/{i}.png" for i in range(50)]
  write(tmp_path, *names)
  (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(
    f"{name},{i}" for i, name in enumerate(names)))
  asked, real = [], os.path.realpath
  monkeypatch.setattr(os.path, "realpath", lambda *a, **k: asked.append(a) or real(*a, **k))
  listed, scandir = [], os.scandir
  monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
  assert len(read_metadata("metadata.csv", folders.Tree(tmp_path), "raise")) == 50
  assert len(asked) == 1 and len(listed) == 2  # the root; the root and its images


def test_many_captions_of_one_image_take_time_in_proportion(tmp_path):
  write(tmp_path, "a.png")

  def seconds(rows):
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "a.png,x\n" * rows)
    before = time.process_time()
    record, = open_source(f"folder:{tmp_path}").splits["train"]
    assert record["text"] == ("x",) * rows
    return time.process_time() - before
  assert seconds(40_000) < 9 * seconds(10_000)  # 4 where it is; 16 where each row copies the others


# Depth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kind", [
  (np.float32, "floating-point"), (np.int32, "32-bit or signed"), (np.uint32, "32-bit or signed"),
  (np.int16, "32-bit or signed")])
def test_numbers_without_a_scale_are_refused_by_name(tmp_path, dtype, kind):
  pixels = np.arange(24).reshape(4, 6).astype(dtype)
  Image.fromarray(pixels).save(tmp_path / "b.tif")
  with pytest.raises(ValueError, match=f"b.tif: its pixels are {kind} numbers.*8 or 16 bits"):
    info_of(tmp_path)
  Image.fromarray(np.full((4, 6), 513, np.uint16)).save(tmp_path / "a.tif")
  data = batches.make(f"folder:{tmp_path}", batch_size=2, on_error="skip")
  np.testing.assert_array_equal(next(data.train(0, 1))["image"], np.full((2, 4, 6, 1), 2))
