"""Captioning: texts of images, one token after another (1411.4555 sec. 3; Cap, 2306.07915 3.1)."""

import functools

import jax.numpy as jnp

from losses import tokens
from methods.image_predictions import image_predictions
from methods.method import Method, check_fields
from models import decoding


def check(smoothing: float, beams: int, length_penalty: float, temperature: float, top_p: float):
  """Raises ValueError where a number of `make` is out of range, or one excludes another."""
  check_fields(
    ("smoothing", smoothing, 0 <= smoothing < 1, "a number in [0, 1)"),
    ("beams", beams, beams >= 1, "at least 1"),
    ("length_penalty", length_penalty, beams > 1 or not length_penalty, "0 with one beam"),
    ("temperature", temperature, temperature >= 0, "at least 0"),
    ("temperature", temperature, beams == 1 or not temperature, "0 with several beams"),
    ("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]"),
    ("top_p", top_p, temperature or top_p == 1, "1 at temperature 0"))


def beam_search(step, cache, *args, beams: int, **kwargs):
  """`decoding.beam`, with what is known of the image held once for all beams of a caption."""
  memory = {name: jnp.repeat(x, beams, 1) for name, x in cache.items() if "memory" in name}

  def own_step(cache, token, index):
    logits, new = step({**cache, **memory}, token, index)
    return logits, {name: new[name] for name in cache}

  cache = {name: x for name, x in cache.items() if name not in memory}
  return decoding.beam(own_step, cache, *args, beams=beams, axis=1, **kwargs)


def make(model, *, smoothing: float = 0.0, beams: int = 1, length_penalty: float = 0.0,
         temperature: float = 0.0, top_p: float = 1.0) -> Method:
  """Each token of a caption is predicted by its image and by the caption's tokens before it.

  `extra` holds the batch statistics of the image network, if it has any.

  Args:
    model: a `models.caption.Captioner`.
    smoothing: of the targets, [0, 1).
    beams: captions that the prediction `caption` follows at a time; 1 = the likeliest token always.
    length_penalty: alpha of `decoding.length_penalty`, for several beams.
    temperature: captions are drawn from softmax(logits / temperature); 0 = nothing is at random.
    top_p: probability of the likeliest tokens, that they are drawn among, (0, 1].
  """
  check(smoothing, beams, length_penalty, temperature, top_p)
  text = model.text

  def init(rng, batch):
    extra = dict(model.init(rng, batch["image"], batch["text"]))
    return extra.pop("params"), extra

  def loss(params, extra, batch, rng, step):
    ids = batch["text"]
    logits, extra = model.apply(
      {"params": params, **extra}, batch["image"], ids, train=True, mutable=["batch_stats"],
      rngs={"dropout": rng, "drop_path": rng})
    valid = tokens.until_end(ids, text.eos_id)                               # b l
    value = tokens.cross_entropy(logits, ids, valid, smoothing)
    right = (logits.argmax(-1) == ids) | ~valid
    return value.mean(), (extra, {"exact": right.all(1).astype(jnp.float32).mean()})

  def run(name, params, extra, *args, **kwargs):
    return model.apply({"params": params, **extra}, *args, method=name, **kwargs)

  def caption(params, extra, batch, rng):
    """Token ids int32 [b, l]: a caption, the end of text and padding."""
    cache = run("begin", params, extra, batch["image"])
    first = jnp.full(len(batch["image"]), text.pad_id)
    ends = dict(eos_id=text.eos_id, pad_id=text.pad_id)
    step = functools.partial(run, "step", params, extra)
    if beams > 1:
      return beam_search(step, cache, first, text.context, beams=beams, alpha=length_penalty,
                         **ends)[0][:, 0]
    choose = decoding.sampler(temperature, top_p) if temperature else decoding.greedy
    return decoding.decode(step, cache, first, text.context, choose=choose, rng=rng, **ends)[0]

  def encode(params, extra, batch, **kwargs):
    return run("encode_image", params, extra, batch["image"], **kwargs)[1]

  predict = image_predictions(model.image, encode, lambda params: params["image"])
  predict.update(caption=caption, cross_attention=lambda params, extra, batch, rng: run(
    "__call__", params, extra, batch["image"], batch["text"], return_weights=True)[1])
  return Method(init, loss, predict, statistics="batch_stats", needs=("image", "text"))
