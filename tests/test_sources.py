import io
import json
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from input_pipeline import decode, geometry, prepared, records, viewing
from input_pipeline.captions import captions_of
from input_pipeline.sources import open_source


def encoded(array, kind="png", **options):
  file = io.BytesIO()
  Image.fromarray(array).save(file, kind, **options)
  return file.getvalue()


def write(path, array=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encoded(np.full((4, 6, 3), 7, np.uint8) if array is None else array))


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


class Pairs(tfds.core.GeneratorBasedBuilder):
  """Three images with the captions of each under coco's name and form."""
  VERSION = tfds.core.Version("1.0.0")
  pkg_dir_path = Path(__file__).parent  # TFDS's own guess needs a package before Python 3.12

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
      "photo": tfds.features.Image(shape=(None, None, 3)),
      "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
      "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(range(3)), "validation": self._generate_examples([9])}

  def _generate_examples(self, seeds):
    for i in seeds:
      yield i, {"photo": encoded(noise(5, 4 + i, 3, seed=i)), "kind": i % 2,
                "captions": [{"id": j, "text": f"{i} {j}"} for j in range(2)]}


@pytest.fixture
def pairs(tmp_path):
  builder = Pairs(data_dir=tmp_path)
  builder.download_and_prepare(file_format="array_record")
  return builder


def test_class_folders(tmp_path):
  for name in ("train/cat/a.png", "train/cat/deep/b.PNG", "train/dog/c.JpG", "test/dog/d.png",
               "train/cat/.hidden.png", "train/cat/notes.txt", "train/.cache/x.png"):
    write(tmp_path / name)
  splits, info = open_source(f"folder:{tmp_path}")
  assert info[:4] == ((4, 6, 3), 2, ("cat", "dog"), {"train": 3, "test": 1})
  records = [(r["name"], r["label"]) for r in splits["train"]]
  assert records == [(str(tmp_path / "train" / name), label) for name, label in
                     (("cat/a.png", 0), ("cat/deep/b.PNG", 0), ("dog/c.JpG", 1))]
  assert splits["test"][0]["label"] == 1
  np.testing.assert_array_equal(decode.decode(splits["test"][0], 3), np.full((4, 6, 3), 7))


def test_flat_folder_of_several_sizes_and_colours(tmp_path):
  write(tmp_path / "b.png", noise(3, 5))
  write(tmp_path / "a.png", noise(3, 4, 3))
  splits, info = open_source(f"folder:{tmp_path}")
  assert info[:4] == ((None, None, 3), 0, (), {"train": 2})
  assert list(splits["train"][0]) == ["image", "name"]


@pytest.mark.parametrize("labels, classes", [
  ((10, 9, 2), ("2", "9", "10")), (("b", "a", "10"), ("10", "a", "b"))])
def test_metadata_gathers_captions_and_sorts_labels(tmp_path, labels, classes):
  lines = []
  for i, label in enumerate(labels):
    write(tmp_path / "images" / f"{i}.png")
    lines += [{"file_name": f"images/{i}.png", "text": t, "label": label} for t in "xy"[:i + 1]]
  (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
  splits, info = open_source(f"folder:{tmp_path}")
  assert info.class_names == classes
  assert [r["text"] for r in splits["train"]] == [("x",), ("x", "y"), ("x", "y")]
  assert [classes[r["label"]] for r in splits["train"]] == list(map(str, labels))
  (tmp_path / "metadata.jsonl").unlink()
  (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + "\n".join(
    ",".join(map(str, line.values())) for line in lines))
  again = open_source(f"folder:{tmp_path}").splits["train"]
  assert [{**r, "name": None} for r in again] == [{**r, "name": None} for r in splits["train"]]
  assert again[1]["name"] == f"{tmp_path}/metadata.csv, line 3, row 2: images/1.png"


@pytest.mark.parametrize("content, match", [
  ("file_name,text\n../out.png,x", "leads out of"),
  ("file_name,text\nlink.png,x", "leads out of"),
  ("file_name,caption\na.png,x", "line 1: needs .* a column 'label' or 'text'.*caption"),
  ("name,text\na.png,x", "line 1: needs a column 'file_name'.*has: 'name', 'text'"),
  ("file_name,text\n", "metadata.csv has no row of use"),
  ('file_name,text\na.png,x\na.png,"y\n', "from line 3 on: not readable as csv"),
])
def test_bad_metadata_is_named(tmp_path, content, match):
  root = tmp_path / "data"
  write(root / "a.png")
  write(tmp_path / "out.png")
  if "link" in content:
    (root / "link.png").symlink_to(tmp_path / "out.png")
  (root / "metadata.csv").write_text(content)
  with pytest.raises((ValueError, FileNotFoundError), match=match):
    open_source(f"folder:{root}")


@pytest.mark.parametrize("kind, row, match, counted", [
  ("csv", b"none.png,x,0", "no such file .*none.png", "missing file 1"),
  ("csv", b"a.png,,0", "'text' is '', which is empty, for file 'a.png'", "unusable text 1"),
  ("csv", b"a.png,  ,0", "'text' is '  ', which is empty", "unusable text 1"),
  ("csv", b"a.png,caf\xe9,0", r"'text' is 'caf\\udce9', which is not UTF-8", "unusable text 1"),
  ("csv", b"caf\xe9.png,x,0", "'file_name' is .* not UTF-8", "unusable file_name 1"),
  ("csv", b"a.png,red, big,0", "more cells than columns; quote", "unreadable row 1"),
  ("csv", b"a.png,x", "'label' is None", "no label 1"),
  ("csv", b"a.png,x,1", "'a.png' has two labels: '0' and '1'", "unusable label 1"),
  ("jsonl", b'{"file_name": "a.png", "label": 0}', "'text' is None", "no text 1"),
  ("jsonl", b'{"file_name": "a.png", "text": 0.5, "label": 0}', "'text' is 0.5", "no text 1"),
  ("jsonl", b'{"text": "x", "label": 0}', "'file_name' is None", "no file_name 1"),
  ("jsonl", rb'{"file_name": "a.png", "text": "\ud800", "label": 0}', "not UTF-8",
   "unusable text 1"),
  ("jsonl", b'{"file_name": "a.png"', "not a JSON object: '{", "unreadable row 1"),
  ("jsonl", b'["a.png", "x", 0]', "not a JSON object", "unreadable row 1")])
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, caplog, kind, row, match, counted):
  for name in "ab":
    write(tmp_path / f"{name}.png")
  path = tmp_path / f"metadata.{kind}"
  good = {"csv": [b'a.png,"one, of\ntwo lines",0', b"b.png,two,1"], "jsonl": [
    b'{"file_name": "a.png", "text": "one, of\\ntwo lines", "label": 0}\n',
    b'{"file_name": "b.png", "text": "two", "label": 1}']}[kind]
  head = [b"file_name,text,label"] if kind == "csv" else []
  path.write_bytes(b"\n".join([*head, good[0], row, good[1]]))
  line = {"csv": 4, "jsonl": 3}[kind]  # after a header and a text of two lines, or a blank line
  with pytest.raises(ValueError, match=f"metadata.{kind}, line {line}, row 2: .*{match}"):
    open_source(f"folder:{tmp_path}")
  splits, info = open_source(f"folder:{tmp_path}", on_error="skip")
  assert info.num_examples == {"train": 2}
  assert [(r["text"], r["label"]) for r in splits["train"]] == [
    (("one, of\ntwo lines",), 0), (("two",), 1)]
  message, = caplog.messages
  assert f"passed over 1 of the 3 rows of {path} ({counted}). The first: {path}, line" in message


def test_an_undecodable_image_of_a_row_is_named_or_left_to_reading(tmp_path):
  write(tmp_path / "a.png")
  (tmp_path / "b.png").write_bytes(b"not an image")
  (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y")
  with pytest.raises(ValueError, match="the image .*metadata.csv, line 3, row 2: b.png"):
    open_source(f"folder:{tmp_path}")
  splits, info = open_source(f"folder:{tmp_path}", on_error="skip")
  assert info[:4] == ((4, 6, 3), 0, (), {"train": 2})
  with pytest.raises(records.BadRecord, match="metadata.csv, line 3, row 2: b.png"):
    decode.decode(splits["train"][1], 3)
  (tmp_path / "a.png").write_bytes(b"nor this")
  with pytest.raises(ValueError, match="none of the images"):
    open_source(f"folder:{tmp_path}", on_error="skip")


def test_bad_folders_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    open_source(f"folder:{tmp_path}/none")
  with pytest.raises(ValueError, match=r"no images in .*looked for \.png \.jpg"):
    open_source(f"folder:{tmp_path}")
  write(tmp_path / "train/cat/a.png")
  (tmp_path / "train/dog").mkdir()
  with pytest.raises(ValueError, match="no images in class folder .*dog"):
    open_source(f"folder:{tmp_path}")
  write(tmp_path / "train/dog/a.png")
  write(tmp_path / "test/dgo/a.png")
  with pytest.raises(ValueError, match="label 'dgo' of split 'test'.*did you mean 'dog'"):
    open_source(f"folder:{tmp_path}")
  (tmp_path / "test/dgo").rename(tmp_path / "test/dog")
  (tmp_path / "test/dog/bad.png").write_bytes(b"not an image")
  with pytest.raises(ValueError, match="cannot decode the image .*bad.png"):
    open_source(f"folder:{tmp_path}")
  (tmp_path / "test/dog/bad.png").unlink()
  (tmp_path / "test/cat").symlink_to(tmp_path / "train/cat")
  with pytest.raises(ValueError, match="test/cat links to a folder"):
    open_source(f"folder:{tmp_path}")


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
  for root in "ab":
    write(tmp_path / root / "x.png")
  first, moved = (open_source(f"folder:{tmp_path / root}").info.fingerprint for root in "ab")
  assert first == moved
  write(tmp_path / "b" / "y.png")
  assert open_source(f"folder:{tmp_path}/b").info.fingerprint != first


@pytest.mark.parametrize("source, match", [
  ("glyps", "did you mean 'glyphs'"), ("folde:/x", "did you mean 'folder:'"),
  ("tfd:mnist", "did you mean 'tfds:'"), ("glyphs/leters", "did you mean 'letters'"),
  ("tfds:mnits", "did you mean 'mnist'"), ("tfds:", "not a source"), ("", "not a source"),
  ("tfds:mnist:9.9.9", "mnist"), ("tests", "write 'folder:tests'")])
def test_unknown_sources_are_named(tmp_path, monkeypatch, source, match):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tests").mkdir()
  with pytest.raises(ValueError, match=match):
    open_source(source, str(tmp_path))


def test_tfds_by_path_and_by_name(pairs, tmp_path):
  splits, info = open_source(f"tfds:{pairs.data_dir}")
  assert info[:4] == ((None, None, 3), 2, ("cat", "dog"), {"train": 3, "validation": 1})
  record = splits["validation"][0]
  assert record["label"] == 1 and record["text"] == ("9 0", "9 1")
  assert record["name"] == "pairs/1.0.0 validation#0"
  np.testing.assert_array_equal(decode.decode(record, 3), noise(5, 13, 3, seed=9))
  bulk = splits["train"].__getitems__(np.array([2, 0]))
  assert bulk == [splits["train"][2], splits["train"][0]] and bulk[0] != bulk[1]
  named = open_source("tfds:pairs", str(tmp_path))
  assert named.info == info
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("captions, match", [
  (("fine", b"caf\xe9"), r"not UTF-8: 'caf\\udce9'"), (("",), "empty"), ((), "empty")])
def test_tfds_captions_are_checked(tmp_path, monkeypatch, captions, match):
  monkeypatch.setattr(Pairs, "_generate_examples", lambda self, seeds: iter([(0, {
    "photo": encoded(noise(5, 4, 3)), "kind": 0,
    "captions": [{"id": 0, "text": text} for text in captions]})]))
  builder = Pairs(data_dir=tmp_path)
  builder.download_and_prepare(file_format="array_record")
  record = open_source(f"tfds:{builder.data_dir}").splits["train"][0]
  with pytest.raises(records.BadRecord, match=f"pairs/1.0.0 train#0: a caption is {match}"):
    captions_of(record)


def test_tfds_folder_errors(pairs, tmp_path):
  with pytest.raises(FileNotFoundError, match="prepared sets inside: .*pairs/1.0.0"):
    open_source(f"tfds:{tmp_path}")
  info = tmp_path / "pairs/1.0.0/dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="stored as tfrecord.*tfds convert_format"):
    open_source(f"tfds:{pairs.data_dir}")


def test_a_set_that_cannot_be_prepared_is_named(tmp_path, monkeypatch):
  def offline(*args, **kwargs):
    raise ConnectionError("no route to host")
  monkeypatch.setattr(Pairs, "_split_generators", offline)
  with pytest.raises(FileNotFoundError, match="'pairs' is not prepared in .*1.0.0.*no route"):
    open_source("tfds:pairs", str(tmp_path))


def test_ambiguous_features_are_listed():
  features = {"left": tfds.features.Image(), "right": tfds.features.Image()}
  with pytest.raises(ValueError, match="several features could be the image: left, right"):
    prepared._feature(features, ("image",), tfds.features.Image)


@pytest.mark.parametrize("shape, channels", [
  ((5, 4), 1), ((5, 4), 3), ((5, 4, 3), 3), ((5, 4, 3), 1), ((5, 4, 4), 4)])
def test_decode_converts_colours(shape, channels):
  array = noise(*shape)
  image = decode.decode({"image": encoded(array), "name": ""}, channels)
  chex.assert_shape(image, (5, 4, channels))
  weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2 luma
  expected = (array[..., None].repeat(channels, -1) if len(shape) == 2 else
              (array @ weights)[..., None] if channels == 1 else array)
  np.testing.assert_allclose(image, expected, atol=1)


def test_decode_scales_16_bits_and_lays_transparency_on_white():
  deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
  image = decode.decode({"image": encoded(deep), "name": ""}, 1)
  np.testing.assert_array_equal(image[..., 0], deep // 256)
  array = noise(5, 4, 4)
  alpha = array[..., 3:] / 255.0
  image = decode.decode({"image": encoded(array), "name": ""}, 3)
  np.testing.assert_allclose(image, array[..., :3] * alpha + 255 * (1 - alpha), atol=1.5)


def seen(record, channels, box, size, coarse=False, **options):
  look = geometry.Look(lambda h, w: geometry.Cut(box, size), "bicubic", **options)
  return viewing.decode_looks(record, channels, [look], coarse)[0]


def test_decode_box_and_size_are_pillows_crop_and_resize():
  array = noise(40, 50, 3)
  record = {"image": encoded(array), "name": ""}
  image = seen(record, 3, (40 // 4, 50 // 5, 20, 27), (8, 9), exact=False)
  crop = Image.fromarray(array[10:30, 10:37]).resize((9, 8), Image.Resampling.BICUBIC)
  # The filter may look past the box's edge, where a crop repeats nothing: compare the inside.
  np.testing.assert_allclose(image[2:-2, 2:-2], np.asarray(crop)[2:-2, 2:-2], atol=1)


def test_jpeg_draft_keeps_the_picture(monkeypatch):
  y, x = np.mgrid[:800, :1000]
  array = np.stack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 45), (x + y) / 8], -1)
  record = {"image": encoded(array.astype(np.uint8), "jpeg", quality=95), "name": ""}
  decoded, resize = [], viewing._resize
  monkeypatch.setattr(viewing, "_resize",
                      lambda image, *a: decoded.append(image.size) or resize(image, *a))
  image = seen(record, 3, (100, 200, 500, 600), (96, 96), coarse=True, exact=False)
  assert decoded == [(250, 200)]  # a quarter: 500 x 600 becomes 125 x 150, still >= 96
  whole = Image.fromarray(array.astype(np.uint8)).crop((200, 100, 800, 600))
  np.testing.assert_allclose(image, np.asarray(whole.resize((96, 96), Image.Resampling.BICUBIC)),
                             atol=8)


def test_undecodable_records_are_named(monkeypatch):
  whole = encoded(noise(64, 64, 3))
  for data in (b"", b"text", whole[:len(whole) // 2]):
    with pytest.raises(ValueError, match="cannot decode the image some/where.png"):
      decode.decode({"image": data, "name": "some/where.png"}, 3)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(ValueError, match="here.*decompression bomb"):
    decode.decode({"image": whole, "name": "here"}, 3)
