"""Classification losses on soft targets: logits [b, classes], targets [b, classes] -> [b]."""

import jax
import jax.numpy as jnp
import optax


def targets(label, num_classes: int, smoothing: float = 0.0, label_mix=None, mix=None,
            multi_label: bool = False):
  """Soft targets [b, classes] in float32: (1 - s) one_hot + s / classes (1512.00567 sec. 7).

  With `label_mix` [b] and `mix` [b], the weight of `label`, the mixture of both labels' targets
  (mixup 1710.09412 eq. 1, CutMix 1905.04899 eq. 1); with `multi_label` both are wholly true, as
  DeiT III trains with binary cross-entropy.
  """
  one_hot = jax.nn.one_hot(label, num_classes)
  if label_mix is not None:
    weight = mix[:, None]
    one_hot = weight * one_hot + (1 - weight) * jax.nn.one_hot(label_mix, num_classes)
  if multi_label:
    one_hot = (one_hot > 0).astype(jnp.float32)
  return optax.smooth_labels(one_hot, smoothing)


def softmax(logits, targets):
  """Cross-entropy -sum_c y_c log softmax(z)_c, per example."""
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid(logits, targets):
  """Binary cross-entropy averaged over the classes (DeiT III, 2204.07118 sec. 3), per example."""
  return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).mean(-1)


def sigmoid_sum(logits, targets):
  """Binary cross-entropy summed over the classes (2006.07159 sec. 3.1), per example."""
  return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(-1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid, "sigmoid_sum": sigmoid_sum}
