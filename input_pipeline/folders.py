"""What a folder shows: no droppings, links that are checked, files by name; which are splits."""

import logging
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("vitrine")

METADATA = ("metadata.csv", "metadata.jsonl")
# What file managers and network drives leave in folders; names with a dot first are hidden anyway.
DROPPINGS = frozenset(name.lower() for name in (
  "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN",
  "System Volume Information", "lost+found", "Network Trash Folder", "Temporary Items",
  "Thumbs.db", "desktop.ini"))
# Names of sub-folders, in any capitals -> of the splits that they are.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "dev": "val", "validation": "validation"}


def composed(text: str) -> str:
  """A name in one spelling: macOS writes an accent as a letter of its own (NFD), others do not."""
  return text if text.isascii() else unicodedata.normalize("NFC", text)


def _is_in(path: str, folder: str) -> bool:
  return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


class Tree:
  """A folder and what is below it, each folder listed once. Paths are relative to `root`."""

  def __init__(self, root: Path, follow_links: bool = False):
    self.root, self.real, self.follow_links = str(root), os.path.realpath(root), follow_links
    self.followed = [self.real]  # folders whose images are read
    self.listed, self.shows, self.spelt = {}, {}, {}

  def path(self, file: str) -> str:
    return os.path.join(self.root, file) if file else self.root

  def entries(self, folder: str) -> dict[str, os.DirEntry]:
    """All that a folder holds, by name."""
    if folder not in self.listed:
      with os.scandir(self.path(folder)) as entries:
        self.listed[folder] = {entry.name: entry for entry in entries}
    return self.listed[folder]

  def shown(self, folder: str) -> dict[str, bool]:
    """{name: is it a folder}, sorted, without what is hidden. Raises ValueError on links."""
    if folder not in self.shows:
      found = {name: entry for name, entry in sorted(self.entries(folder).items())
               if not name.startswith(".") and name.lower() not in DROPPINGS}
      for entry in found.values():
        if entry.is_symlink():
          self.check(entry)
      self.shows[folder] = {name: entry.is_dir() for name, entry in found.items()}
    return self.shows[folder]

  def check_inside(self, path: str):
    """Raises ValueError where links lead out of the root and may not."""
    if not self.follow_links and not _is_in(os.path.realpath(path), self.real):
      raise ValueError(f"{path} leads out of {self.root}; --config.data.follow_links=true reads "
                       "what links lead to")

  def check(self, link: os.DirEntry):
    """Raises ValueError where a link leads out and may not, or to images that are read already."""
    self.check_inside(link.path)
    if link.is_dir():
      real = os.path.realpath(link.path)
      if any(_is_in(real, other) or _is_in(other, real) for other in self.followed):
        raise ValueError(f"{link.path} links to a folder, whose images would be read twice")
      self.followed.append(real)

  def find(self, file: str, is_dir: bool = False) -> str | None:
    """A file's path as it stands on the disk, or None where there is none.

    A name that is not there as it is spelt may be so in NFC or NFD. Raises ValueError where links
    lead out of the root and may not.
    """
    folder, name = os.path.split(file)
    if folder not in self.spelt:  # as it is given -> as it is, its entries, their composed names
      there = self.find(folder, is_dir=True) if folder else ""
      entries = {} if there is None else self.entries(there)
      self.spelt[folder] = there, entries, {
        composed(known): entry for known, entry in entries.items() if not known.isascii()}
    there, entries, others = self.spelt[folder]
    entry = entries.get(name) or others.get(composed(name))
    if entry is None:  # a disk that does not tell capitals apart finds some that are not listed
      path = self.path(file)
      if not (os.path.isdir(path) if is_dir else os.path.isfile(path)):
        return None
      self.check_inside(path)
      return file
    if entry.is_symlink():
      self.check_inside(entry.path)
    if not (entry.is_dir() if is_dir else entry.is_file()):
      return None
    return f"{there}/{entry.name}" if there else entry.name


def find_splits(tree: Tree, extensions: tuple[str, ...]) -> dict[str, str]:
  """{split: its folder}; {"train": ""} where the root has classes, images or metadata itself.

  Raises ValueError where sub-folders only look like splits.
  """
  shown = tree.shown("")
  folders = [name for name, is_dir in shown.items() if is_dir]
  named = [name for name in folders if name.lower() in SPLITS]
  splits = {name: name for name in named if name in SPLITS.values()}
  left = [name for name in shown if name not in named and (name in folders or name in METADATA)]
  is_split = len(splits) > 1 and "train" in splits or folders == ["train"]
  if not named or not is_split and any(name in METADATA for name in shown):
    inner = tree.shown(folders[0]) if len(folders) == 1 else {}
    if found := [name for name, is_dir in inner.items() if is_dir and name.lower() in SPLITS]:
      log.warning("%s: %r is taken for a class, but holds %s: is folder:%s meant?", tree.root,
                  folders[0], ", ".join(map(repr, found)), tree.path(folders[0]))
    return {"train": ""}
  for name in named:
    split = SPLITS[name.lower()]
    if split not in splits:
      splits[split] = name
    elif splits[split] != name:
      if splits[split] != split:
        raise ValueError(f"{tree.root}: {splits[split]!r} and {name!r} are both names of the split "
                         f"{split!r}: keep one of them there")
      left.append(name)
  if not ("train" in splits and len(splits) > 1) and len(folders) > len(named):
    _check_classes(tree, named, [name for name in folders if name not in named])
    return {"train": ""}
  images = sum(name.lower().endswith(extensions) for name in shown if name not in folders)
  left = [*map(repr, left), *([f"{images} images"] if images else [])]
  if left:
    log.warning("%s: left out, beside the splits %s: %s", tree.root,
                ", ".join(map(repr, splits.values())), ", ".join(left))
  return {split: splits[split] for split in dict.fromkeys(SPLITS.values()) if split in splits}


def _check_classes(tree: Tree, named: list[str], others: list[str]):
  """Raises ValueError unless folders that are named like splits can only be classes beside others.

  They can where they have images alone, beside several others: the trains of a set of vehicles.
  """
  inner = [name for name in named
           if any(is_dir or name in METADATA for name, is_dir in tree.shown(name).items())]
  said = ", ".join(map(repr, named))
  if inner or len(others) == 1:
    raise ValueError(
      f"{tree.root}: named like splits: {said}; not: {', '.join(map(repr, others[:8]))}. "
      "Splits are folders named train and test (or val, valid, validation, dev), each with "
      "the class folders: rename those that are, move the others away. If all of these are "
      "classes, put them into a folder 'train'")
  log.warning("%s: %s taken for classes, as the %d folders beside are", tree.root, said,
              len(others))


def same_as_before(splits: Mapping[str, str]) -> list[str]:
  """Those of the splits that runs before know: other names were left out once, beside these.

  A fingerprint is of these where they are enough, so that such runs go on.
  """
  known = [split for split, folder in splits.items() if folder == split]
  return known if "train" in known and len(known) > 1 else [*splits]
