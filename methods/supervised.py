"""Supervised classification, softmax or sigmoid, with soft targets."""

from typing import Literal

import jax
import jax.numpy as jnp

from losses import classification
from losses.accuracy import topk_correct
from methods.image_predictions import image_predictions
from methods.method import Method


def make(model, *, loss: Literal[*classification.LOSSES] = "softmax", label_smoothing: float = 0.0,
         multi_label: bool = False, image_train: bool = True,
         batch_size: int | None = None) -> Method:
  """A classifier [b, h, w, c] -> [b, classes] learns labels.

  `extra` is what the model has beside parameters: batch statistics, or nothing.

  Args:
    model: `__call__(image, train=..., return_weights=...) -> (logits, out)` as `models.vit.ViT`.
    loss: a name in `losses.classification.LOSSES`.
    label_smoothing: in [0, 1).
    multi_label: whether both labels of a mixed image count as wholly true (DeiT III).
    image_train: False runs the network as in evaluation, without dropout, drop path and batch
      statistics of its own: for one that is frozen but for its head.
    batch_size: examples that a loss sees, to check the model's `bn_groups` if it has them.
  """
  if not model.num_classes:
    raise ValueError("method supervised needs labels: the data has none, model.num_classes is 0")
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"method.label_smoothing = {label_smoothing}: expected a number in [0, 1)")

  groups = getattr(model, "bn_groups", 1)
  if batch_size and batch_size % groups:
    raise ValueError(f"model.bn_groups = {groups}: does not divide the {batch_size} examples of a "
                     "batch (divided by config.accumulate)")

  def init(rng, batch):
    extra = dict(model.init(rng, batch["image"]))
    return extra.pop("params"), extra

  def run(params, extra, batch, **kwargs):
    return model.apply({"params": params, **extra}, batch["image"], **kwargs)

  def compute_loss(params, extra, batch, rng, step):
    dropout, drop_path = jax.random.split(rng)
    (logits, _), extra = run(params, extra, batch, train=image_train, mutable=["batch_stats"],
                             rngs={"dropout": dropout, "drop_path": drop_path})
    targets = classification.targets(batch["label"], model.num_classes, label_smoothing,
                                     batch.get("label_mix"), batch.get("mix"), multi_label)
    value = classification.LOSSES[loss](logits, targets).mean()
    hit = topk_correct(logits, batch["label"], 1)
    return value, (extra, {"top1": hit.astype(jnp.float32).mean()})

  predict = image_predictions(
    model, lambda params, extra, batch, **kwargs: run(params, extra, batch, **kwargs)[1])
  predict["logits"] = lambda params, extra, batch, rng: run(params, extra, batch)[0]
  return Method(init, compute_loss, predict, statistics="batch_stats", needs=("image", "label"))
