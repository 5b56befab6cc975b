"""Momentum Contrast: v1 (1911.05722), v2 (2003.04297) and v3 (2104.02057)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from losses import contrastive
from losses.accuracy import topk_correct
from methods.image_predictions import image_predictions
from methods.method import Contrast, Method, check_fields

SCHEDULES = {
  # (momentum, share of the run) -> momentum
  "constant": lambda momentum, done: momentum,
  "cosine": lambda momentum, done: 1 - (1 - momentum) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
}


def check(model, batch_size: int, queue_size: int, momentum: float, temperature: float):
  """Raises ValueError where a number of `make` is out of range, or groups do not divide a batch."""
  check_fields(
    ("queue_size", queue_size, queue_size == 0 or queue_size >= batch_size,
     f"0 or at least the batch size, {batch_size}"),
    ("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)"),
    ("temperature", temperature, temperature > 0, "a number above 0"))
  if batch_size % model.bn_groups:
    raise ValueError(f"model.bn_groups = {model.bn_groups}: does not divide the {batch_size} "
                     "examples of a batch (divided by config.accumulate)")


def start(rng, params, stats, queue_size: int, dim: int) -> dict:
  """`extra` at first: copies for the momentum encoder, and a queue [K, d] of random directions."""
  encoder = {name: x for name, x in params.items() if name != "predictor"}
  extra = {"stats": stats, "momentum_params": jax.tree.map(jnp.copy, encoder),
           "momentum_stats": jax.tree.map(jnp.copy, stats),
           "updated": jnp.full((), -1, jnp.int32)}
  if queue_size:
    queue = jax.random.normal(rng, (queue_size, dim))
    extra.update(queue=contrastive.normalize(queue), pointer=jnp.zeros((), jnp.int32),
                 queued_at=jnp.zeros(queue_size, jnp.int32))
  return extra


def update_momentum(params, extra, m, step):
  """theta_k <- m theta_k + (1 - m) theta_q (1911.05722 eq. 2), once a step if accumulating."""
  m = jnp.where(step == extra["updated"], 1.0, m)
  old = extra["momentum_params"]
  new = optax.incremental_update(jax.lax.stop_gradient({name: params[name] for name in old}),
                                 old, 1 - m)
  return {**extra, "momentum_params": new, "updated": jnp.asarray(step, jnp.int32)}


def queue_loss(run, params, extra, batch, rng, step, temperature: float, shuffles: bool):
  """Algorithm 1 of 1911.05722: keys, logits against the queue as it was, then enqueue.

  Args:
    run: (params, stats, image, rng, method) -> (unit-norm embeddings [b, d], new stats).
    shuffles: keys are encoded in the order of batch["shuffle"] [b].

  Returns:
    (their mean, (`extra` after them, `metrics_of` them and the mean age of keys in steps)).
  """
  query_key, key_key = jax.random.split(rng)
  query, stats = run(params, extra["stats"], batch["image"], query_key)
  image = batch["image_2"]
  if shuffles:
    order = jnp.argsort(batch["shuffle"])
    image = jnp.take(image, order, axis=0)
  key, momentum_stats = run(extra["momentum_params"], extra["momentum_stats"], image, key_key,
                            "encode")
  if shuffles:
    key = jnp.take(key, jnp.argsort(order), axis=0)
  logits = contrastive.queue_logits(query, key, extra["queue"], temperature)
  label = jnp.zeros(query.shape[0], jnp.int32)
  length = extra["queue"].shape[0]
  place = (extra["pointer"] + jnp.arange(query.shape[0])) % length
  extra = {**extra, "stats": stats, "momentum_stats": momentum_stats,
           "queue": extra["queue"].at[place].set(jax.lax.stop_gradient(key)),
           "queued_at": extra["queued_at"].at[place].set(step + 1),
           "pointer": (extra["pointer"] + query.shape[0]) % length}
  age = (step + 1 - extra["queued_at"]).astype(jnp.float32).mean()
  metrics = {**metrics_of(query, logits, label, temperature), "queue_age": age}
  return contrastive.info_nce(logits, label).mean(), (extra, jax.lax.stop_gradient(metrics))


def embed_views(run, params, extra, batch, rng):
  """(q1, q2, k1, k2, each unit-norm [b, d]; `extra` after them) of two views: no queue, as v3."""
  rngs = jax.random.split(rng, 4)
  q1, stats = run(params, extra["stats"], batch["image"], rngs[0])
  q2, stats = run(params, stats, batch["image_2"], rngs[1])
  keys, key_stats = extra["momentum_params"], extra["momentum_stats"]
  k1, key_stats = run(keys, key_stats, batch["image"], rngs[2], "encode")
  k2, key_stats = run(keys, key_stats, batch["image_2"], rngs[3], "encode")
  return (q1, q2, k1, k2), {**extra, "stats": stats, "momentum_stats": key_stats}


def compare_views(temperature: float, params, features, step):
  """Algorithm 1 of 2104.02057: ctr(q1, k2) + ctr(q2, k1), each times 2 tau -> (scalar, metrics)."""
  q1, q2, k1, k2 = features
  label = jnp.arange(q1.shape[0])
  logits = contrastive.batch_logits(q1, k2, temperature)
  value = 2 * temperature * (
    contrastive.info_nce(logits, label)
    + contrastive.info_nce(contrastive.batch_logits(q2, k1, temperature), label))
  return value.mean(), jax.lax.stop_gradient(metrics_of(q1, logits, label, temperature))


def metrics_of(query, logits, label, temperature: float) -> dict:
  """How well queries [b, d] find their keys by logits [b, n], and whether they have collapsed."""
  positive = jnp.take_along_axis(logits, label[:, None], axis=1)
  negatives = logits.shape[1] - 1
  return {
    "top1": topk_correct(logits, label, 1).astype(jnp.float32).mean(),
    "top5": topk_correct(logits, label, 5).astype(jnp.float32).mean(),
    "positive": positive.mean() * temperature,
    "negative": ((logits.sum(1) - positive[:, 0]) / negatives).mean() * temperature,
    # Over the batch, of each dimension, in units of what points all over the sphere have.
    "feature_std": query.std(0).mean() * query.shape[1] ** 0.5}


def warn_of_collapse(threshold: float, metrics) -> str:
  if metrics["feature_std"] < threshold:
    return (f"feature_std {metrics['feature_std']:.2g} is under method.collapse_threshold = "
            f"{threshold}: all images have nearly the same embedding (collapse)")
  return ""


def make(model, *, batch_size: int, total_steps: int, queue_size: int = 65536,
         momentum: float = 0.999, momentum_schedule: Literal[*SCHEDULES] = "constant",
         temperature: float = 0.07, collapse_threshold: float = 0.05) -> Method:
  """A query encoder learns to tell its image's key from other images' keys.

  With a queue (v1, v2) the negatives are the last `queue_size` keys; the keys of a batch are
  encoded in a random order, so that with several `bn_groups` query and key do not share their batch
  statistics (1911.05722 sec. 3.3). Without one (v3) they are the other keys of the batch, both ways
  between two views. `extra` holds the momentum encoder, the running statistics and the queue.

  Args:
    model: a `models.moco.MoCo`.
    batch_size: examples that a loss sees.
    total_steps: of the run, for the schedule of the momentum.
    queue_size: keys in the queue, at least a batch; 0 = none.
    momentum: of the key encoder, in [0, 1).
    momentum_schedule: a name in SCHEDULES; cosine ends at 1.
    temperature: above 0.
    collapse_threshold: a run warns when `feature_std` falls under it.
  """
  check(model, batch_size, queue_size, momentum, temperature)
  shuffles = queue_size > 0 and model.bn_groups > 1

  def draw(rng, batch):
    if not shuffles or "shuffle" in batch:
      return batch
    return {**batch, "shuffle": jax.random.uniform(rng, batch["image"].shape[:1])}

  def init(rng, batch):
    model_key, queue_key = jax.random.split(rng)
    variables = model.init(model_key, batch["image"])
    params = variables.pop("params")
    return params, start(queue_key, params, variables, queue_size, model.dim)

  def run(params, stats, image, rng, method=None):
    """(unit-norm embeddings [b, dim], the statistics after them) in training."""
    y, stats = model.apply({"params": params, **stats}, image, train=True, method=method,
                           mutable=["batch_stats"], rngs={"dropout": rng, "drop_path": rng})
    return contrastive.normalize(y[0] if method else y), stats

  def moved(params, extra, step):
    now = SCHEDULES[momentum_schedule](momentum, step / total_steps)
    return update_momentum(params, extra, now, step)

  def against_queue(params, extra, batch, rng, step):
    return queue_loss(run, params, moved(params, extra, step), batch, rng, step, temperature,
                      shuffles)

  def embed(params, extra, batch, rng, step):
    return embed_views(run, params, moved(params, extra, step), batch, rng)

  def encode(params, extra, batch, **kwargs):
    return model.apply({"params": params, **extra["stats"]}, batch["image"], method="encode",
                       **kwargs)[1]

  predict = image_predictions(model.backbone, encode, lambda params: params["backbone"])
  loss = against_queue if queue_size else Contrast(
    embed, functools.partial(compare_views, temperature))
  return Method(init, loss, predict, draw, functools.partial(warn_of_collapse, collapse_threshold),
                statistics="stats/batch_stats", needs=("image", "image_2"))
