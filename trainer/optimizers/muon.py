"""Muon: orthogonalised updates of matrices."""

import jax
import optax
from optax import contrib

from trainer.optimizers import adamw
from trainer.parts import path_name


def make(learning_rate, weight_decay, mask, *, beta: float = 0.95, ns_steps: int = 5,
         consistent_rms: float | None = 0.2, b1: float = 0.9, b2: float = 0.95):
  """Muon on the matrices of the blocks (query, key and value apart), AdamW on all else.

  Args:
    beta: momentum.
    ns_steps: Newton-Schulz iterations.
    consistent_rms: 0.2 gives updates AdamW's scale, so that one rate serves both (2502.16982).
    b1, b2: AdamW's.
  """
  axes = {"qkv_kernel": contrib.MuonDimensionNumbers(1, (3, 4)),             # layer d 3 k h
          "out/kernel": contrib.MuonDimensionNumbers((1, 2), 3),             # layer k h d
          "up/kernel": contrib.MuonDimensionNumbers(1, 2),                   # layer d hidden
          "down/kernel": contrib.MuonDimensionNumbers(1, 2)}

  def matrix_axes(path, _):
    name = path_name(path)
    return next((spec for end, spec in axes.items()
                 if "blocks" in name.split("/") and name.endswith(end)), None)

  def labels(params):
    return jax.tree.map_with_path(
      lambda *leaf: "adamw" if matrix_axes(*leaf) is None else "muon", params)

  return optax.partition({
    "muon": contrib.muon(
      learning_rate, beta=beta, ns_steps=ns_steps, weight_decay=weight_decay,
      consistent_rms=consistent_rms,
      muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(matrix_axes, params)),
    "adamw": adamw.make(learning_rate, weight_decay, mask, b1=b1, b2=b2)}, labels)
