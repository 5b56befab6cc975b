"""The pictures of the embedded data set, as `sources/glyphs.py` has them drawn on first use."""

import functools
import io
import string
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

PLAIN = string.digits + string.ascii_letters

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


def splits(every: bool) -> dict[str, tuple[Mapping[str, str], Callable[[str], bool]]]:
  """(faces, which characters of them) by split; `every` character in "test", or plain ones only."""
  return {"train": (SEEN, lambda c: not is_unseen_name(c)),
          "test": (UNSEEN, lambda c: every or c in PLAIN),
          "unseen_names": (SEEN, is_unseen_name)}


def examples(faces: Mapping[str, str], keep: Callable[[str], bool], labels: Collection[str],
             size: int) -> Iterator[tuple[str, dict]]:
  """(key, example) of those characters that have one of the labels; of SEEN, each bitmap once."""
  drawn = set()
  for face, style in faces.items():
    for character in filter(keep, characters(face)):
      label = base_character(character) or "other"
      if label not in labels:
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
