import io
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import chex
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image

from input_pipeline import glyph_drawing as drawing
from input_pipeline.sources import glyphs


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """Every example of glyphs/digits_16 by split, decoded by Pillow alone."""
  builder = glyphs.Glyphs(config="digits_16", data_dir=tmp_path_factory.mktemp("data"))
  builder.download_and_prepare(file_format="array_record")
  return builder, {split: list(builder.as_data_source(split)) for split in builder.info.splits}


@pytest.mark.parametrize("character, base", [
  ("A", "A"), ("é", "e"), ("①", "1"), ("𝔸", "A"), ("²", "2"), ("ẫ", "a"), ("ℌ", "H"),
  ("½", ""), ("ﬁ", ""), ("Ǆ", ""), ("Α", ""), ("ø", ""), (" ", ""), ("´", ""), ("́", "")])
def test_base_character(character, base):
  assert drawing.base_character(character) == base


@pytest.mark.parametrize("face", ["DejaVuSans", "STIXGeneralItalic", "cmr10"])
@pytest.mark.parametrize("character", "AcCgQ0o")
def test_scale_and_baseline_are_those_of_the_outline(face, character):
  size, em = 64, 52
  outline = TextPath((0, 0), character, em, prop=FontProperties(fname=drawing.font_path(face)))
  box = outline.get_extents()  # pixels, y upwards from the baseline
  ink = drawing.render(face, character, size).point(lambda v: 255 * (v > 64))
  left, top, right, bottom = ink.getbbox()
  np.testing.assert_allclose([48 - top, 48 - bottom, right - left],
                             [box.y1, box.y0, box.width], atol=1.6)
  np.testing.assert_allclose((left + right) / 2, size / 2, atol=1)


@pytest.mark.parametrize("character", "Ǻ∰Ể")  # taller or wider than the canvas allows
def test_overflowing_ink_is_shrunk_in_proportion(character):
  prop = FontProperties(fname=drawing.font_path("DejaVuSans"))
  box = TextPath((0, 0), character, 100, prop=prop).get_extents()
  left, top, right, bottom = drawing.render("DejaVuSans", character, 128).getbbox()
  np.testing.assert_allclose((right - left) / (bottom - top), box.width / box.height, rtol=0.03)


def test_white_ink_on_black_at_any_size():
  for size in glyphs.SIZES:
    image = np.asarray(drawing.render("DejaVuSans", "I", size))
    chex.assert_shape(image, (size, size))
    assert image[0].max() == 0 and image.max() > 128
  small, large = (np.asarray(drawing.render("DejaVuSans", "B", s), np.float64) for s in (32, 224))
  pooled = large.reshape(32, 7, 32, 7).mean((1, 3))
  assert np.abs(small - pooled).mean() < 6  # of 255: the same picture, hinting aside


def test_every_subset_names_its_classes():
  for name, config in glyphs.Glyphs.builder_configs.items():
    assert name == config.subset + ("" if config.size == 32 else f"_{config.size}")
  assert {s: len(c) for s, c in glyphs.CLASSES.items()} == {"all": 63, "letters": 62, "digits": 10}
  assert glyphs.Glyphs.BUILDER_CONFIGS[0].name == "all"  # TFDS's default


def test_a_tenth_of_the_names_is_unseen_and_never_a_plain_one():
  names = [c for c in drawing.characters("DejaVuSans") if c not in glyphs.PLAIN]
  assert 0.08 < np.mean([drawing.is_unseen_name(c) for c in names]) < 0.12
  assert not any(map(drawing.is_unseen_name, glyphs.PLAIN))


def test_splits_share_no_family_and_no_name(digits):
  _, splits = digits
  names = {split: {e["code_point"] for e in examples} for split, examples in splits.items()}
  faces = {split: {e["face"].decode() for e in examples} for split, examples in splits.items()}
  assert faces["train"] == set(drawing.SEEN) and faces["test"] == set(drawing.UNSEEN)
  assert faces["unseen_names"] <= set(drawing.SEEN)
  assert not names["train"] & names["unseen_names"]
  assert names["test"] == set(map(ord, glyphs.DIGITS)) < names["train"]
  assert len(splits["test"]) == 10 * len(drawing.UNSEEN)
  seen = Counter((e["code_point"], e["image"].tobytes()) for e in splits["train"])
  assert max(seen.values()) == 1


def test_examples_agree_with_unicode(digits):
  builder, splits = digits
  for example in sum(splits.values(), []):
    character = chr(example["code_point"])
    assert str(unicodedata.digit(character)) == builder.info.features["label"].int2str(
      int(example["label"]))
    style = {**drawing.SEEN, **drawing.UNSEEN}[example["face"].decode()]
    assert example["style"].decode() == style
    assert example["text"].decode() == f"{unicodedata.name(character).lower()}, {style}"
    chex.assert_shape(example["image"], (16, 16, 1))
    assert example["image"].max() > 64
  assert builder.info.metadata["unidata_version"] == unicodedata.unidata_version


def test_records_are_png_in_array_record(digits):
  builder, splits = digits
  assert builder.info.file_format.value == "array_record"
  import tensorflow_datasets as tfds
  raw = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})[7]["image"]
  assert raw.startswith(b"\x89PNG")
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw))),
                                splits["test"][7]["image"][..., 0])


def test_two_processes_may_prepare_at_once(tmp_path):
  code = ("import sys; from input_pipeline.sources import open_source;"
          "s = open_source('glyphs/digits_16', sys.argv[1]);"
          "print(s.splits['test'][99]['name'], s.info.fingerprint, 'tensorflow' in sys.modules)")
  processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path], text=True,
                                cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for _ in range(2)]
  results = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], results
  first, second = (out.splitlines()[-1] for out, _ in results)
  assert first == second and first.endswith("False")
  assert [p.name for p in (tmp_path / "glyphs" / "digits_16").iterdir()] == ["1.0.0"]
