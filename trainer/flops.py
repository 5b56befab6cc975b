"""FLOPs of a function, counted in its jaxpr."""

from collections.abc import Callable

import jax


def count_flops(function: Callable, *args) -> int:
  """FLOPs of the matrix products and convolutions in a function, from its jaxpr.

  Multiply-adds count two. A scanned body counts as often as it runs, which the compiler's own
  figure gets wrong. A rematerialised part counts each time, of a choice by platform the default.
  """
  def visit(jaxpr, times):
    total = 0
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        total += 2 * eqn.outvars[0].aval.size * _product(eqn.invars[0].aval.shape, contract)
      elif eqn.primitive.name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval, eqn.params["dimension_numbers"]
        total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[spec.rhs_spec[0]]
      elif eqn.primitive.name == "cond":
        branches = [visit(branch.jaxpr, 1) for branch in eqn.params["branches"]]
        total += branches[-1] if eqn.params.get("branches_platforms") else max(branches)
        continue
      inner = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
      for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
          total += visit(getattr(value, "jaxpr", value), inner)
    return total * times
  return visit(jax.make_jaxpr(function)(*args).jaxpr, 1)


def _is_jaxpr(value) -> bool:
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _product(shape, axes) -> int:
  result = 1
  for axis in axes:
    result *= shape[axis]
  return result
