"""Masked language modelling: BERT (1810.04805) and UniLM's mix of attention masks (1905.03197)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from losses import tokens
from methods.method import Method, check_fields
from models import masks as attention_masks

BOTH_WAYS, PREFIX, FORWARD, BACKWARD = range(4)
UNILM = (1 / 3, 1 / 3, 1 / 6, 1 / 6)  # shares of these in a batch (1905.03197 sec. 2.4)


def unilm(rng, own):
  """Each text's attention mask [b, 1, l, l] and segments int [b, l] (1905.03197 sec. 2.3, fig. 1).

  A token sees all, those up to it, those from it on, or, in a text of two segments, the first one
  and what is before it of the second. Where the second begins is drawn among `own` [b, l], the
  text's tokens without special ones: each has at least one of them, if there are two.
  """
  b, length = own.shape
  kind_key, cut_key = jax.random.split(rng)
  kind = jax.random.choice(kind_key, 4, (b,), p=jnp.array(UNILM))
  count = own.sum(1)
  after = 1 + jnp.floor(jax.random.uniform(cut_key, (b,)) * (count - 1)).astype(int)
  cut = own.argmax(1) + jnp.clip(after, 1, count)                            # b
  seen = jnp.select([kind == BOTH_WAYS, kind == PREFIX], [length, cut], 0)
  mask = attention_masks.prefix(seen, length)                                # b 1 l l
  mask = jnp.where((kind == BACKWARD)[:, None, None, None], mask.swapaxes(2, 3), mask)
  second = (kind == PREFIX)[:, None] & (jnp.arange(length)[None] >= cut[:, None])
  return mask, second.astype(jnp.int32)


def own_tokens(model, ids):
  """True for the tokens that are neither the start nor the end of a text, nor padding: [b, l]."""
  place = jnp.arange(ids.shape[1])[None]
  eos_id = model.encoder.eos_id
  return (place >= model.starts) & tokens.until_end(ids, eos_id) & (ids != eos_id)


def hide(model, mask_ratio: float, mask_share: float, random_share: float, rng, ids):
  """What the network is given of texts int [b, l], by the shares that `make` describes.

  {"masked" int [b, l], "places" int [b, m], "chosen" bool [b, m], which of these places count}.
  """
  own = own_tokens(model, ids)
  count = jnp.maximum(jnp.round(mask_ratio * own.sum(1)), 1)
  count = jnp.minimum(count, own.sum(1))[:, None]                            # b 1
  most = max(1, round(mask_ratio * (ids.shape[1] - model.starts - 1)))
  order_key, how_key, token_key = jax.random.split(rng, 3)
  noise = jnp.where(own, jax.random.uniform(order_key, ids.shape), 2)
  places = noise.argsort(1)[:, :most]                                        # b m
  taken = jnp.arange(most)[None] < count                                     # b m
  chosen = jnp.put_along_axis(jnp.zeros_like(own), places, taken, 1, inplace=False)  # b l
  how = jax.random.uniform(how_key, ids.shape)
  other = jax.random.randint(token_key, ids.shape, 0, model.encoder.vocab_size, ids.dtype)
  given = jnp.select([~chosen | (how >= mask_share + random_share), how >= mask_share],
                     [ids, other], model.mask_id)
  return {"masked": given, "places": places, "chosen": taken}


def check(model, masks: str, mask_ratio: float, mask_share: float, random_share: float):
  """Raises ValueError as `make` says."""
  check_fields(
    ("mask_ratio", mask_ratio, 0 < mask_ratio < 1, "a number in (0, 1)"),
    ("mask_share", mask_share, 0 <= mask_share <= 1, "a number in [0, 1]"),
    ("random_share", random_share, 0 <= random_share <= 1 - mask_share + 1e-9,
     f"a number in [0, {1 - mask_share:.4g}], what mask_share leaves"))
  if masks == "unilm" and model.encoder.causal:
    raise ValueError("method.masks = 'unilm' says who sees whom: it needs model.causal = False")
  if model.mask_id is None:
    raise ValueError("method.name = 'bert' needs a mask token, which the tokenizer has not: set "
                     "data.mask_token = True")


def make(model, *, masks: Literal["bert", "unilm"] = "bert", mask_ratio: float = 0.15,
         mask_share: float = 0.8, random_share: float = 0.1) -> Method:
  """An encoder of texts learns to tell tokens that are hidden from it (1810.04805 sec. 3.1).

  Of a text of n tokens, special ones not counted, max(1, round(mask_ratio n)) are chosen. Each is
  hidden by the mask token, replaced by one of the vocabulary, or kept. The loss is the mean over
  the chosen ones of the batch.

  Args:
    model: a `models.bert.Bert`.
    masks: "bert", all tokens see each other; or "unilm", see `unilm`.
    mask_ratio: share of the tokens that are chosen, (0, 1).
    mask_share, random_share: of the chosen ones, [0, 1] together; the rest is kept.

  Raises:
    ValueError: a number out of range, or a tokenizer that has no mask token.
  """
  check(model, masks, mask_ratio, mask_share, random_share)
  choose = functools.partial(hide, model, mask_ratio, mask_share, random_share)

  def draw(rng, batch):
    if "masked" in batch:
      return batch
    hide_key, mask_key = jax.random.split(rng)
    batch = {**batch, **choose(hide_key, batch["text"])}
    chosen = batch["chosen"].astype(jnp.float32)
    # The mean over the whole batch, however it is split.
    batch["weight"] = chosen * (len(chosen) / jnp.maximum(chosen.sum(), 1))
    if masks == "unilm":
      batch["mask"], batch["segments"] = unilm(mask_key, own_tokens(model, batch["text"]))
      batch["segments"] = jnp.minimum(batch["segments"], max(model.encoder.segments - 1, 0))
    return batch

  def init(rng, batch):
    return model.init(rng, batch["text"])["params"], {}

  def loss(params, extra, batch, rng, step):
    ids, weight = jnp.take_along_axis(batch["text"], batch["places"], axis=1), batch["weight"]
    logits = model.apply(
      {"params": params}, batch["masked"], batch.get("segments"), batch.get("mask"),
      batch["places"], train=True, rngs={"dropout": rng, "drop_path": rng})  # b m v
    value = jnp.sum(tokens.each_cross_entropy(logits, ids) * weight, axis=1)  # b
    right = jnp.sum((logits.argmax(-1) == ids) * weight, axis=1)
    return value.mean(), (extra, {"accuracy": right.mean()})

  return Method(init, loss, predictions(model, choose), draw, needs=("text",))


def predictions(model, choose):
  """Predictions by name; `choose` is `hide` with its shares, (rng, ids) -> what is hidden."""
  def masked(params, extra, batch, rng):
    """What is hidden of each text, and told: `hide`'s, and "told", "likelihood" (log), [b, m]."""
    hidden = choose(rng, batch["text"])
    ids = jnp.take_along_axis(batch["text"], hidden["places"], axis=1)       # b m
    logits = model.apply({"params": params}, hidden["masked"], places=hidden["places"])
    return {**hidden, "told": logits.argmax(-1),
            "likelihood": -tokens.each_cross_entropy(logits, ids)}

  def encode(name):
    return lambda params, extra, batch, rng: model.apply(
      {"params": params}, batch["text"], batch.get("segments"), method="encode")[1][name]

  return {
    "features": encode("features"), "tokens": encode("tokens"), "masked": masked,
    "own_tokens": lambda params, extra, batch, rng: own_tokens(model, batch["text"]),
    "logits": lambda params, extra, batch, rng: model.apply(
      {"params": params}, batch["text"], batch.get("segments"))}
