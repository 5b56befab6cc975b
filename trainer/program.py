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


def model_flops(recipe, state) -> int:
  """FLOPs of losses and gradients in one training step, as if nothing was computed twice."""
  from trainer.flops import count_flops
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
