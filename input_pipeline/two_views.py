"""Two views of each image, for contrastive learning: a recipe and the one that differs from it."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax

from input_pipeline import geometry
from input_pipeline.records import nearest

# By two views.
SHARED = ("eval_crop", "eval_squash", "mixup", "cutmix", "mix_prob", "mix_size", "mix_partner")


def check(second_view: Any, fields: Mapping, known: Collection[str]) -> None:
  """Raises ValueError where two views cannot differ as `second_view` says.

  Args:
    fields: of the first view. known: names of all that a view has.
  """
  check = functools.partial(geometry.check, "augment")
  check(hasattr(second_view, "keys"), "second_view", second_view, "None or a dict")
  allowed = sorted({*known} - {*SHARED})
  for name in second_view:
    if name not in allowed:
      raise ValueError(f"augment.second_view.{name}: two views differ in no such field; "
                       + nearest(name, allowed))
  for name in ("mixup", "cutmix"):
    check(not fields.get(name), name, fields.get(name), "0 with a second_view")


def join(first: Any, second: Any, names: Collection[str]) -> Any:
  """Two `augment.Augment`s as one, whose training batches have each of `names` and NAME_2 too.

  The second view is of NAME_2 where the host has cut one, else of NAME.
  """
  def train(rng, batch):
    first_key, second_key = jax.random.split(rng)
    other = {name: batch.get(f"{name}_2", batch[name]) for name in names}
    seen = second.train(second_key, other)
    return {**first.train(first_key, batch), **{f"{name}_2": x for name, x in seen.items()}}

  return first._replace(train=train)
