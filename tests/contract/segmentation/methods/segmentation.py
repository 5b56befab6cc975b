"""Supervised segmentation: a class at each pixel."""

from losses import pixels
from methods.method import Method


def make(model) -> Method:
  """A network [b, h, w, c] -> [b, h, w, classes] learns masks [b, h, w]."""
  def init(rng, batch):
    return model.init(rng, batch["image"])["params"], {}

  def loss(params, extra, batch, rng, step):
    logits = model.apply({"params": params}, batch["image"])
    return pixels.cross_entropy(logits, batch["mask"]).mean(), (extra, {})

  def segment(params, extra, batch, rng):
    return model.apply({"params": params}, batch["image"]).argmax(-1)

  return Method(init, loss, {"segment": segment}, needs=("image", "mask"))
