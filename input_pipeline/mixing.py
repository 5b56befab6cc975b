"""Mixup and CutMix: images and labels of a batch mixed with others of it, on the device."""

import functools

import jax
import jax.numpy as jnp

from input_pipeline import erasing

PARTNERS = ("mirror", "previous")


def draw_share(key, height, width, mixup, cutmix, prob, partner):
  """What one group of `mix` draws: the weight of the own pixels [h, w, 1], and of the own label."""
  apply_key, coin_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 5)
  ones = jnp.ones((height, width, 1))
  if mixup:
    weight = jax.random.beta(mixup_key, mixup, mixup)
    weight = jnp.maximum(weight, 1 - weight) if partner == "previous" else weight
    own = weight * ones
  if cutmix:
    # The box of timm 0.3.2, for which DeiT and MAE ask: its sides are even, later ones' are not.
    lengths = jnp.array([height, width])
    half = jnp.floor(lengths * jnp.sqrt(1 - jax.random.beta(cutmix_key, cutmix, cutmix))) // 2
    corner = jax.random.randint(place_key, (2,), 0, lengths) - half
    box = erasing.fill_box(ones, *corner, *(2 * half), 0.0)
    take = ~jax.random.bernoulli(coin_key) if mixup else True
    own = jnp.where(take, box, own if mixup else 1.0)
    weight = jnp.where(take, box.mean(), weight if mixup else 1.0)
  apply = jax.random.bernoulli(apply_key, prob)
  return jnp.where(apply, own, ones), jnp.where(apply, weight, 1.0)


def mix(key, batch, mixup, cutmix, prob=1.0, size=None, partner="mirror"):
  """Mixup (1710.09412) or CutMix (1905.04899) of examples with others of their group.

  One draw a group: lambda ~ Beta(alpha, alpha), and a fair coin between the two where both are on.

  Args:
    batch: "image" float [b, h, w, c] and "label" int [b]. mixup, cutmix: alpha, 0 for off.
    prob: that a group is mixed. size: consecutive examples in a group, None for the batch.
    partner: "mirror", the example at the group's other end (timm/data/mixup.py, mode "batch", each
      process for its own batch); or "previous" in it, round about, with the larger of lambda and
      1 - lambda for the own example (big_vision/utils.py, `get_mixup`).
  Returns:
    the batch with "label_mix" int [b] and "mix" float32 [b], the weight of the example's own label:
    for CutMix its share of the pixels, once the box is clipped at the edge.
  Raises:
    ValueError: the batch has no labels, or does not consist of groups of that size.
  """
  if "label" not in batch:
    raise ValueError(f"augment.mixup and augment.cutmix need labels, not only {sorted(batch)}")
  b, h, w, _ = batch["image"].shape
  size = size or b
  check_mix_size(size, b)

  def grouped(x):  # consecutive rows are on one device: where groups are, nothing crosses
    return x.reshape(b // size, size, *x.shape[1:])

  def other(x):
    x = grouped(x)
    return x[:, ::-1] if partner == "mirror" else jnp.roll(x, 1, 1)

  draw = functools.partial(draw_share, height=h, width=w, mixup=mixup, cutmix=cutmix, prob=prob,
                           partner=partner)
  own, weight = jax.vmap(draw)(jax.random.split(key, b // size))                   # g h w 1, g
  own = own[:, None]
  image = own * grouped(batch["image"]) + (1 - own) * other(batch["image"])
  return {**batch, "image": image.reshape(batch["image"].shape),
          "label_mix": other(batch["label"]).reshape(b),
          "mix": jnp.repeat(weight, size)}


def check_mix_size(size, batch_size):
  if batch_size % size:
    raise ValueError(f"augment.mix_size = {size}: must be None, for the whole batch, or divide "
                     f"its {batch_size} examples")
