"""What methods on images tell of their network, whatever it learned."""

from collections.abc import Callable

import jax.numpy as jnp

from models.positions import ABSOLUTE
from models.vit import ViT


def image_predictions(network, encode: Callable, own: Callable = lambda params: params):
  """What a network of images can tell, whatever it learns: predictions by name.

  `features` [b, d]; `tokens` [b, n, d] of the patches; `filters` [d, p, p, c] of the first layer,
  which asks nothing of a batch. A ViT also tells the `attention` [b, k, q, q] of its last block;
  `attention_layers`, of all: {"weights" [b, depth, k, q, q], "shares" [b, q], what each token
  counts for the features, "prefix" [b], how many stand before the patches}; and, if it has
  positions, their table: `positions` [n, d].

  Args:
    network: a `models.vit.ViT` or `models.resnet.ResNet`.
    encode: (params, extra, batch, **kwargs) -> its named intermediates.
    own: the method's parameters -> the network's.
  """
  def part(name, **kwargs):
    return lambda params, extra, batch, rng: encode(params, extra, batch, **kwargs)[name]

  def attention_layers(params, extra, batch, rng):
    out = encode(params, extra, batch, return_weights="all")
    b, n, _ = out["tokens"].shape
    shares = jnp.broadcast_to(network.pool_shares(n), (b, network.prefix + n))
    return {"weights": out["weights"], "shares": shares, "prefix": jnp.full(b, network.prefix)}

  predict = {"features": part("features"), "tokens": part("tokens"),
             "filters": lambda params, extra, batch, rng: network.filters(own(params))}
  if isinstance(network, ViT):
    predict.update(attention=part("weights", return_weights=True),
                   attention_layers=attention_layers)
    if network.positions in ABSOLUTE[1:]:  # added to tokens
      predict["positions"] = lambda params, extra, batch, rng: network.position_table(own(params))
  return predict
