"""Where examples come from: a file here for each, found by the scheme of `data.source`.

`SCHEME:REST`, or `SCHEME/REST` for a source that is not a place. Its file has
`open_source(rest, **options) -> records.Source`, of those of this package's `open_source` that it
takes, and gives random access to encoded records.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

from input_pipeline.decode import decode as decode  # pixels of the records that sources give
from input_pipeline.records import Source, listed, nearest


def open_source(source: str, data_dir: str | None = None, on_error: str = "raise",
                latents: str | None = None, held_out: float | None = None,
                follow_links: bool = False) -> Source:
  """Opens a source for random access; prepares a TFDS set on first use.

  Args:
    source: `glyphs`, `glyphs/letters_16`, `tfds:NAME[/CONFIG]`, `tfds:PATH` (a prepared folder),
      `folder:PATH` or `lines:PATH`: see the files of this folder.
    data_dir: where TFDS keeps its sets; its own default if None.
    on_error: "skip" passes over the bad rows of a metadata file, and warns of their number.
    latents: where arrays of an autoencoder stand in the place of images: see
      `input_pipeline.latents.read_latent`.
    held_out: share of `lines:` that the split "test" has, or of a folder with one split alone.
    follow_links: whether links of a folder may lead out of it.

  Raises:
    ValueError, FileNotFoundError: an unknown source, or one that cannot be read, and why.
  """
  module, rest = find(source)
  options = dict(data_dir=data_dir, on_error=on_error, latents=latents, held_out=held_out,
                 follow_links=follow_links)
  taken = inspect.signature(module.open_source).parameters
  return module.open_source(rest, **{k: v for k, v in options.items() if k in taken})


def parts(source: str) -> tuple[str, str, str]:
  """(SCHEME, ":", REST) of SCHEME:REST, a place; (SCHEME, "", REST) of SCHEME/REST or SCHEME."""
  scheme, mark, rest = source.partition(":")
  if not mark:
    scheme, _, rest = source.partition("/")
  return scheme, mark, rest


def find(source: str):
  """(the module of a source, what follows its scheme). Raises ValueError where there is none."""
  known = sorted(module.name for module in pkgutil.iter_modules(__path__))
  scheme, mark, rest = parts(source)
  if scheme in known:
    module = importlib.import_module(f"{__name__}.{scheme}")
    if rest and mark or not mark and not module.NEEDS_REST:
      return module, rest
  if source and Path(source).expanduser().is_dir():
    raise ValueError(f"data.source={source!r} is a folder: write 'folder:{source}' for a folder of "
                     f"images, 'tfds:{source}' for a prepared TFDS set")
  known = ("glyphs", "tfds:", "folder:", "lines:")
  raise ValueError(f"data.source={source!r} is not a source (glyphs[/CONFIG], tfds:NAME, "
                   "tfds:PATH, folder:PATH, lines:PATH); "
                   + nearest(scheme + mark, known, listed(known)))
