"""Bright rectangles on noise, with all that lies on an image: mask, boxes, points and depth."""

import numpy as np

from input_pipeline.records import Feature, Source, describe, fingerprint

NEEDS_REST = False
SIDE = 24


class Blobs:
  def __init__(self, split: str, count: int):
    self.split, self.count = split, count

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    rng = np.random.default_rng([int(i), self.split == "test"])
    top, left = rng.integers(2, SIDE - 10, 2)
    height, width = rng.integers(5, 9, 2)
    mask = np.zeros((SIDE, SIDE), np.int32)
    mask[top:top + height, left:left + width] = 1
    image = rng.integers(0, 80, (SIDE, SIDE, 1)) + 150 * mask[..., None]
    box = (top, left, top + height, left + width)
    return {"image": image.astype(np.uint8), "mask": mask, "depth": mask * 2.0, "boxes": [box],
            "points": [(top + height / 2, left + width / 2)], "name": f"blob {i} of {self.split}"}

  def __getitems__(self, indices):
    return [self[i] for i in indices]


def open_source(rest: str) -> Source:
  counts = {"train": 256, "test": 64}
  features = {"image": Feature((SIDE, SIDE, 1), "uint8", "image"),
              "mask": Feature((SIDE, SIDE), "int32", "mask", 2),
              "depth": Feature((SIDE, SIDE), "float32", "depth"),
              "boxes": Feature((3, 4), "float32", "boxes"),
              "points": Feature((2, 2), "float32", "points")}
  return Source({split: Blobs(split, n) for split, n in counts.items()},
                describe(features, counts, fingerprint("blobs", counts)))
