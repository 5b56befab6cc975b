"""The embedded data set: the glyphs of the fonts that matplotlib ships, rendered on first use.

Vector outlines give any image size, Unicode names give captions; nothing is downloaded. A TFDS
builder, so it is prepared once and then read like any other TFDS set.
"""

import functools
import io
import re
import unicodedata
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import tensorflow_datasets as tfds
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.records import Source, nearest
from input_pipeline.sources import tfds as prepared

NEEDS_REST = False  # `glyphs` alone is all of them

DIGITS = "0123456789"
PLAIN = DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CLASSES = {"all": (*PLAIN, "other"), "letters": tuple(PLAIN), "digits": tuple(DIGITS)}
SIZES = (16, 24, 32, 48, 64, 96, 128, 224)  # pixels, the side of the image

SEEN = {  # face: style, the second half of a caption
  "DejaVuSans": "sans", "DejaVuSans-Bold": "bold sans",
  "DejaVuSans-Oblique": "italic sans", "DejaVuSans-BoldOblique": "bold italic sans",
  "DejaVuSansMono": "mono", "DejaVuSansMono-Bold": "bold mono",
  "DejaVuSansMono-Oblique": "italic mono", "DejaVuSansMono-BoldOblique": "bold italic mono",
  "DejaVuSerif": "serif", "DejaVuSerif-Bold": "bold serif",
  "DejaVuSerif-Italic": "italic serif", "DejaVuSerif-BoldItalic": "bold italic serif"}
UNSEEN = {
  "STIXGeneral": "serif", "STIXGeneralBol": "bold serif",
  "STIXGeneralItalic": "italic serif", "STIXGeneralBolIta": "bold italic serif",
  # Computer Modern: only PLAIN, as the other slots do not sit where Unicode puts them.
  "cmr10": "serif", "cmb10": "bold serif", "cmti10": "italic serif", "cmmi10": "italic serif",
  "cmss10": "sans", "cmtt10": "mono"}


def base_character(character: str) -> str:
  """The one of PLAIN that `character` is a form of (accented, circled, fraktur), or ""."""
  base = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
  return base[0] if len(base) == 1 and base[0] in PLAIN else ""


def is_unseen_name(character: str) -> bool:
  """Whether the code point is one of the tenth held out of training; never one of PLAIN."""
  return character not in PLAIN and zlib.crc32(b"%d" % ord(character)) % 10 == 0


def font_path(face: str) -> Path:
  return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")


def characters(face: str) -> list[str]:
  """The characters of a face that have a Unicode name, in the order of their code points."""
  if face.startswith("cm"):
    return sorted(PLAIN)
  charmap = FT2Font(str(font_path(face))).get_charmap()
  return [c for c in map(chr, sorted(charmap)) if unicodedata.name(c, "")]


@functools.lru_cache(64)
def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
  # BASIC: no shaping library, whose presence would otherwise change the bitmaps.
  return ImageFont.truetype(font_path(face), pixels, layout_engine=ImageFont.Layout.BASIC)


def render(face: str, character: str, size: int) -> Image.Image:
  """One glyph, white ink on black: mode "L", `size` x `size` pixels.

  An em is 26/32 of the side and the baseline lies at 24/32 from the top for every glyph, so that
  c and C, o, O and 0 differ; the ink is centred across, and shrunk only where it would overflow.
  Drawn at four times the size, then box-filtered.
  """
  side, baseline, em = 4 * size, 3 * size, 13 * size // 4

  def draw(em):  # with room around: Pillow's text boxes hold the advance too, so look for the ink
    image = Image.new("L", (4 * side, 2 * side))
    ImageDraw.Draw(image).text((2 * side, side // 2 + baseline), character, 255, _font(face, em),
                               anchor="ms")
    return image, image.getbbox() or (0, side, 0, side)

  image, (left, top, right, bottom) = draw(em)
  shrink = min(side / max(right - left, 1), baseline / max(side // 2 + baseline - top, 1),
               (side - baseline) / max(bottom - side // 2 - baseline, 1))
  if shrink < 1:
    image, (left, top, right, bottom) = draw(int(em * shrink))
  left = (left + right - side) // 2
  return image.crop((left, side // 2, left + side, side // 2 + side)).reduce(4)


class GlyphsConfig(tfds.core.BuilderConfig):
  """Subset and image size, named SUBSET (32 pixels) or SUBSET_SIZE."""

  def __init__(self, subset: str, size: int):
    super().__init__(name=subset if size == 32 else f"{subset}_{size}",
                     description=f"{subset}, {size} x {size} pixels")
    self.subset, self.size = subset, size


class Glyphs(tfds.core.GeneratorBasedBuilder):
  """Rendered glyphs with class and caption; trained on DejaVu, tested on unseen font families.

  Subsets: `all`, every named code point, where `label` is the letter or digit that it is a form of
  (its NFKD base), or "other"; `letters` and `digits` hold only such forms, with 62 and 10 classes.

  Splits: `train`, DejaVu without the held-out code points, each (code point, bitmap) once;
  `test`, STIX and Computer Modern, in `letters` and `digits` the plain code points only;
  `unseen_names`, the held-out tenth of the code points (none of 0-9A-Za-z), in DejaVu.

  Bitmaps differ a little between FreeType versions, names between Unicode versions.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [GlyphsConfig(subset, size) for subset in CLASSES
                     for size in sorted(SIZES, key=lambda s: s != 32)]  # the first is the default

  def _info(self):
    size = self.builder_config.size
    return self.dataset_info_from_configs(
      description=re.sub(r"\n +", "\n", self.__doc__),
      features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=CLASSES[self.builder_config.subset]),
        "text": tfds.features.Text(doc="greek small letter omega, bold italic serif"),
        "code_point": np.int32,
        "face": tfds.features.Text(),
        "style": tfds.features.Text()}),
      supervised_keys=("image", "label"),
      metadata=tfds.core.MetadataDict(
        unidata_version=unicodedata.unidata_version, matplotlib=matplotlib.__version__))

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(SEEN, lambda c: not is_unseen_name(c)),
      "test": self._generate_examples(
        UNSEEN, lambda c: self.builder_config.subset == "all" or c in PLAIN),
      "unseen_names": self._generate_examples(SEEN, is_unseen_name)}

  def _generate_examples(self, faces, keep):
    subset, size = self.builder_config.subset, self.builder_config.size
    drawn = set()
    for face, style in faces.items():
      for character in filter(keep, characters(face)):
        label = base_character(character) or "other"
        if label not in CLASSES[subset]:
          continue
        image = render(face, character, size)
        if image.getbbox() is None:
          continue  # no ink: a space, or a code point the face maps to an empty glyph
        identity = character, image.tobytes()
        if faces is SEEN and identity in drawn:
          continue  # chess pieces, say, look the same in upright and slanted faces
        drawn.add(identity)
        png = io.BytesIO()
        image.save(png, "png")
        yield f"{face}-{ord(character):06x}", {
          "image": png.getvalue(),  # encoded: TFDS needs TensorFlow to encode pixels
          "label": label,
          "text": f"{unicodedata.name(character).lower()}, {style}",
          "code_point": ord(character),
          "face": face,
          "style": style}


# --- The source -----------------------------------------------------------------------------------

def _builder(name: str, data_dir: str | None) -> Glyphs:
  name = name or "all"
  if name not in Glyphs.builder_configs:
    raise ValueError(f"data.source={'glyphs/' + name!r}: no such configuration {name!r}; "
                     + nearest(name, tuple(Glyphs.builder_configs)))
  return Glyphs(config=name, data_dir=data_dir)


def open_source(rest: str, *, data_dir: str | None = None) -> Source:
  """Opens `glyphs/CONFIG`, which is prepared on first use."""
  builder = _builder(rest, data_dir)
  if not builder.is_prepared():
    prepared.prepare(builder)
    builder = _builder(rest, data_dir)  # as on disk, whoever wrote it
  return prepared.open_builder(builder)


def shape(rest: str) -> tuple[tuple[int, int], int, int]:
  """(image size, channels, classes) of an embedded set, before it is prepared."""
  features = _builder(rest, None).info.features
  *size, channels = features["image"].shape
  return tuple(size), channels, features["label"].num_classes
