"""Tones of eight pitches in noise: a waveform and which pitch it is."""

import numpy as np

from input_pipeline.records import Feature, Source, describe, fingerprint

NEEDS_REST = False
SAMPLES, PITCHES = 1024, 8


class Tones:
  def __init__(self, split: str, count: int):
    self.split, self.count = split, count

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    rng, pitch = np.random.default_rng([int(i), self.split == "test"]), int(i) % PITCHES
    phase = rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * (20 + 30 * pitch) * np.arange(SAMPLES) / SAMPLES + phase)
    wave = (wave + 0.3 * rng.normal(size=SAMPLES)).astype(np.float32)
    return {"wave": wave, "label": pitch, "name": f"tone {i} of {self.split}"}

  def __getitems__(self, indices):
    return [self[i] for i in indices]


def open_source(rest: str) -> Source:
  counts = {"train": 256, "test": 64}
  features = {"wave": Feature((SAMPLES,), "float32", "audio"),
              "label": Feature((), "int32", "label", PITCHES)}
  return Source({split: Tones(split, n) for split, n in counts.items()},
                describe(features, counts, fingerprint("tones", counts),
                         [f"pitch {i}" for i in range(PITCHES)]))
