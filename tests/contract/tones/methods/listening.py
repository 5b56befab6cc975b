"""Supervised classification of sounds."""

from losses import classification
from methods.method import Method


def make(model) -> Method:
  """A network [b, t, f] -> (features, logits) learns labels."""
  def run(params, batch):
    return model.apply({"params": params}, batch["wave"])

  def init(rng, batch):
    return model.init(rng, batch["wave"])["params"], {}

  def loss(params, extra, batch, rng, step):
    targets = classification.targets(batch["label"], model.num_classes)
    return classification.LOSSES["softmax"](run(params, batch)[1], targets).mean(), (extra, {})

  return Method(init, loss, {
    "features": lambda params, extra, batch, rng: run(params, batch)[0],
    "logits": lambda params, extra, batch, rng: run(params, batch)[1]}, needs=("wave", "label"))
