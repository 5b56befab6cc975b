"""Supervised classification, softmax or sigmoid, with soft targets."""

import jax
import jax.numpy as jnp

from losses import classification
from methods.method import Method

CHOICES = {"loss": classification.LOSSES}


def make(model, *, loss: str = "softmax", label_smoothing: float = 0.0,
         multi_label: bool = False) -> Method:
  """A classifier [b, h, w, c] -> [b, classes] learns labels.

  Args:
    model: `__call__(image, train=..., return_weights=...) -> (logits, out)` as `models.vit.ViT`.
    loss: a name in `losses.classification.LOSSES`.
    label_smoothing: in [0, 1).
    multi_label: whether both labels of a mixed image count as wholly true (DeiT III).
  """
  if not model.num_classes:
    raise ValueError("method supervised needs labels: the data has none, model.num_classes is 0")
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"method.label_smoothing = {label_smoothing}: expected a number in [0, 1)")

  def init(rng, batch):
    return model.init(rng, batch["image"])["params"], {}

  def compute_loss(params, extra, batch, rng, step):
    dropout, drop_path = jax.random.split(rng)
    logits, _ = model.apply({"params": params}, batch["image"], train=True,
                            rngs={"dropout": dropout, "drop_path": drop_path})
    targets = classification.targets(batch["label"], model.num_classes, label_smoothing,
                                     batch.get("label_mix"), batch.get("mix"), multi_label)
    value = classification.LOSSES[loss](logits, targets).mean()
    hit = classification.topk_correct(logits, batch["label"], 1)
    return value, (extra, {"top1": hit.astype(jnp.float32).mean()})

  def run(params, batch, **kwargs):
    return model.apply({"params": params}, batch["image"], **kwargs)

  predict = {
    "logits": lambda params, extra, batch, rng: run(params, batch)[0],
    "features": lambda params, extra, batch, rng: run(params, batch)[1]["features"],
    "tokens": lambda params, extra, batch, rng: run(params, batch)[1]["tokens"],
    "attention": lambda params, extra, batch, rng:
      run(params, batch, return_weights=True)[1]["weights"],
  }
  return Method(init, compute_loss, predict)
