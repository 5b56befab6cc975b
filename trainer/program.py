"""What a run compiles, its first state and its step; what these are and cost, in words."""

import platform
from collections.abc import Callable

import jax

from trainer import recipe as recipes
from trainer import sharding
from trainer.optimizer import stop_frozen
from trainer.state import make_init, make_step, phase_gradient


def initial_state(recipe):
  """() -> TrainState at step 0."""
  return make_init(recipe.method, recipe.tx, recipe.augment.eval, recipe.data.spec,
                   recipe.config.seed, max(recipe.config.ema_decay, recipe.config.ema_gamma) > 0)


def jitted_step(recipe, shardings):
  """(state, batch) -> (state, metrics) on the recipe's mesh, the state donated."""
  config = recipe.config
  step = make_step(recipe.method, recipe.tx, recipe.augment.train, seed=config.seed,
                   accumulate=config.accumulate, ema_decay=config.ema_decay,
                   ema_gamma=config.ema_gamma, stop=stop_frozen(config.optimizer),
                   mesh=recipe.mesh)
  return jax.jit(step, in_shardings=(shardings, sharding.batch_sharding(recipe.mesh)),
                 out_shardings=(shardings, sharding.replicated(recipe.mesh)), donate_argnums=0,
                 compiler_options=sharding.compiler_options(recipe.mesh))


def compiled_step(recipe, abstract, shardings):
  """`jitted_step` compiled for the shapes of `abstract_state` and of the recipe's batches."""
  rows = sharding.batch_sharding(recipe.mesh)
  batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows),
                       recipe.data.spec)
  return jitted_step(recipe, shardings).lower(abstract, batch).compile()


def abstract_state(recipe, init: Callable | None = None):
  """(shapes of the state with their shardings, the shardings alone), of `init` if at hand."""
  shapes = jax.eval_shape(init or initial_state(recipe))
  shardings = sharding.shard_state(shapes, recipe.mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      shapes, shardings), shardings


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


def model_flops(recipe, state) -> int:
  """FLOPs of losses and gradients in one training step, as if nothing was computed twice."""
  config = recipes.ConfigDict(recipe.config.to_dict())
  if "remat" in config.model:
    del config.model.remat
  method, stop = recipes.make_method(config), stop_frozen(config.optimizer)

  def gradients(params, extra, batch):
    key = jax.random.key(0)
    batch = method.draw(key, batch)
    return [phase_gradient(phase, stop, params, extra,
                           jax.tree.map(lambda x, j=j, n=phase.times: x[j::n], batch), key, 0)[1]
            for phase in method.turns.values() for j in range(phase.times)]

  batch = jax.eval_shape(lambda spec: recipe.augment.train(jax.random.key(0), spec),
                         recipe.data.spec)
  return count_flops(gradients, state.params, state.extra, batch)


def describe(recipe, state, start: int, workdir) -> dict[str, str]:
  """What is trained, on what: the lines shown at the start."""
  config, info, devices = recipe.config, recipe.data.info, jax.devices()
  train_size, batch_size = info.num_examples[recipe.data.train_split], config.data.batch_size
  return {
    "recipe": f"{config.config_name}: method {config.method.name}, model {config.model.name} "
              + str(config.model.get("variant") or ""),
    "data": f"{config.data.source}: " + ", ".join(
      f"{n:,} {split}" for split, n in info.num_examples.items()) + " examples",
    "devices": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()}), mesh "
               + ", ".join(f"{name} {size}" for name, size in recipe.mesh.shape.items()),
    "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
    "model FLOPs": f"{model_flops(recipe, state):.3g} a step of {batch_size} examples",
    "steps": f"{recipe.total:,} ({recipe.total * batch_size / train_size:.1f} epochs)"
             + (f", continuing from step {start:,}" if start else ""),
    "expected": config.expect or "not measured; README.md lists the recipes that are",
    "run directory": str(workdir)}
