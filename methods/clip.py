"""Images and captions in one space: CLIP (2103.00020), SigLIP (2303.15343), LiT (2111.07991)."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from losses import contrastive
from methods.image_predictions import image_predictions
from methods.method import Contrast, Method


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x, bound: float):
  """min(x, bound), from where a gradient may lead down but no further up.

  CLIP's code sets its parameter back to the bound after each step. The gradient of `minimum` would
  be 0 from there on, whatever the loss wants.
  """
  return jnp.minimum(x, bound)


at_most.defvjp(lambda x, bound: (jnp.minimum(x, bound), x),
               lambda bound, x, g: (jnp.where(x < bound, g, jnp.maximum(g, 0)),))


def check(model, batch_size: int, loss: str, chunk: int, max_logit_scale: float | None):
  """Raises ValueError, with the field, where these do not go together."""
  if (loss == "sigmoid") != (model.init_bias is not None):
    raise ValueError(f"method.loss = {loss!r} and model.init_bias = {model.init_bias}: the sigmoid "
                     "loss needs a bias (SigLIP: -10.0), the softmax would cancel it (None)")
  if chunk < 0 or chunk and batch_size % chunk:
    raise ValueError(f"method.chunk = {chunk}: expected 0 or a divisor of the {batch_size} pairs "
                     "of a batch (divided by config.accumulate)")
  if max_logit_scale is not None and max_logit_scale < model.init_scale:
    raise ValueError(f"method.max_logit_scale = {max_logit_scale}: expected at least "
                     f"model.init_scale, {model.init_scale:.4g}")


def make(model, *, batch_size: int, loss: Literal["softmax", "sigmoid"] = "softmax", chunk: int = 0,
         max_logit_scale: float | None = 100.0, image_train: bool = True) -> Method:
  """Two towers learn to tell an image's caption from the other captions of the global batch.

  To lock a tower (LiT) give its path, "^image/" or "^text/", to optimizer.frozen. `extra` holds the
  batch statistics of the image tower, if it has any.

  Args:
    model: a `models.clip.CLIP`; the sigmoid loss needs its bias.
    batch_size: pairs that a loss sees.
    loss: "softmax" (2103.00020 fig. 3) or "sigmoid" (2303.15343 alg. 1).
    chunk: captions whose logits exist at a time, dividing the batch; 0 = all.
    max_logit_scale: the multiplier's bound (2103.00020 sec. 2.5); None = none, as in SigLIP.
    image_train: False for a locked image tower: it runs as in evaluation, and its batch statistics
      stay what they are.
  """
  check(model, batch_size, loss, chunk, max_logit_scale)

  def scale_of(logit_scale):
    return jnp.exp(logit_scale if max_logit_scale is None else
                   at_most(logit_scale, math.log(max_logit_scale)))

  def init(rng, batch):
    extra = dict(model.init(rng, batch["image"], batch["text"]))
    return extra.pop("params"), extra

  def embed(params, extra, batch, rng, step):
    (image, text, *_), extra = model.apply(
      {"params": params, **extra}, batch["image"], batch["text"], train=True,
      image_train=image_train, mutable=["batch_stats"], rngs={"dropout": rng, "drop_path": rng})
    return (image, text), extra

  def compare(params, features, step):
    (image, text), scale = features, scale_of(params["logit_scale"])
    if loss == "softmax":
      value = contrastive.clip_loss(image, text, scale, chunk)
    else:
      value = contrastive.siglip_loss(image, text, scale, params["logit_bias"], chunk)
    image, text, scale = jax.lax.stop_gradient((image, text, scale))
    hit = contrastive.nearest_text(image, text, chunk) == jnp.arange(image.shape[0])
    return value.mean(), {"logit_scale": scale, "top1": hit.astype(jnp.float32).mean()}

  def run(name, params, extra, x, **kwargs):
    return model.apply({"params": params, **extra}, x, method=name, **kwargs)

  def encode(params, extra, batch, **kwargs):
    return run("encode_image", params, extra, batch["image"], **kwargs)[1]

  predict = image_predictions(model.image, encode, lambda params: params["image"])
  predict.update(
    embed_image=lambda params, extra, batch, rng: run("embed_image", params, extra, batch["image"]),
    embed_text=lambda params, extra, batch, rng: run("embed_text", params, extra, batch["text"]),
    logit_scale=lambda params, extra, batch, rng: scale_of(params["logit_scale"]))
  return Method(init, Contrast(embed, compare), predict, statistics="batch_stats",
                needs=("image", "text"))
