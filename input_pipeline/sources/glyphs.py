"""The embedded data set: the glyphs of the fonts that matplotlib ships, rendered on first use.

Vector outlines give any image size, Unicode names give captions; nothing is downloaded. A TFDS
builder, so it is prepared once, by `glyph_drawing`, and then read like any other TFDS set.
"""

import re
import string
import unicodedata

import matplotlib
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import prepared
from input_pipeline.records import Source, listed, nearest

NEEDS_REST = False  # `glyphs` alone is all of them

DIGITS = string.digits
PLAIN = DIGITS + string.ascii_uppercase + string.ascii_lowercase
CLASSES = {"all": (*PLAIN, "other"), "letters": tuple(PLAIN), "digits": tuple(DIGITS)}
SIZES = (16, 24, 32, 48, 64, 96, 128, 224)  # pixels, the side of the image


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
    from input_pipeline import glyph_drawing
    splits = glyph_drawing.splits(every=self.builder_config.subset == "all")
    return {split: self._generate_examples(*drawn) for split, drawn in splits.items()}

  def _generate_examples(self, faces, keep):
    from input_pipeline import glyph_drawing
    return glyph_drawing.examples(faces, keep, CLASSES[self.builder_config.subset],
                                  self.builder_config.size)


# --- The source -----------------------------------------------------------------------------------

def _builder(name: str, data_dir: str | None) -> Glyphs:
  name = name or "all"
  if name not in Glyphs.builder_configs:
    known = tuple(Glyphs.builder_configs)
    raise ValueError(f"data.source={'glyphs/' + name!r}: no such configuration {name!r}; "
                     + nearest(name, known, listed(known)))
  return Glyphs(config=name, data_dir=data_dir)


def open_source(rest: str, *, data_dir: str | None = None) -> Source:
  """Opens `glyphs/CONFIG`, which is prepared on first use."""
  builder = _builder(rest, data_dir)
  if not builder.is_prepared():
    from input_pipeline.sources.tfds import prepare
    prepare(builder)
    builder = _builder(rest, data_dir)  # as on disk, whoever wrote it
  return prepared.open_builder(builder)


def shape(rest: str) -> tuple[tuple[int, int], int, int]:
  """(image size, channels, classes) of an embedded set, before it is prepared."""
  features = _builder(rest, None).info.features
  *size, channels = features["image"].shape
  return tuple(size), channels, features["label"].num_classes
