"""The training state and one step on it: gradient, accumulation, optimizer, EMA."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.fields import nearest
from trainer.parts import part_of, with_part


class TrainState(NamedTuple):
  """All that is carried from step to step, arrays only: this is the checkpoint."""

  step: jax.Array  # int32 [], how many steps were taken
  params: Any
  opt: Any
  extra: Any  # the method's own state
  ema: Any  # running average of params for evaluation, or None
  ema_statistics: Any = None  # the averaged network's batch statistics; None or {}: there are none


# The averaged network sees a batch in each of the first steps, and then in every so manyth: it
# changes slowly, and its statistics are not the average of those that the network itself had.
STATISTICS_AT_FIRST, STATISTICS_EVERY = 100, 10


def statistics(method, extra) -> dict:
  """The running statistics in `extra` that belong to the parameters; {} where there are none."""
  for name in method.statistics.split("/"):
    extra = extra.get(name, {})
  return extra


def with_statistics(method, extra, values) -> dict:
  """`extra` with others in the place of `statistics`; as it is where there are none."""
  def put(tree, names):
    return {**tree, names[0]: put(tree[names[0]], names[1:])} if names else values
  return put(extra, method.statistics.split("/")) if values else extra


def make_init(method, tx, evaluate_batch: Callable, spec, seed: int, with_ema: bool) -> Callable:
  """() -> TrainState at step 0, to be jitted. `spec` is the shape of a training batch."""
  def init():
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
    params, extra = method.init(jax.random.fold_in(jax.random.key(seed), 0),
                                evaluate_batch(batch))
    averages = (params, statistics(method, extra)) if with_ema else (None, None)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra,
                      *jax.tree.map(jnp.copy, averages))
  return init


def phase_gradient(phase, stop: Callable, params, *rest):
  """((loss, (extra, metrics)), gradients) of a phase: of its part of the parameters alone."""
  def loss(part, *rest):
    return phase.loss(with_part(params, stop(part)), *rest)

  return jax.value_and_grad(loss, has_aux=True)(part_of(params, phase.part), *rest)


def make_turn(name: str, phase, tx, accumulate: int, stop: Callable, mesh) -> Callable:
  """((params, opt, extra), batch, rng, step) -> (the same three, metrics): one phase of a step."""
  run = gradients = functools.partial(phase_gradient, phase, stop)
  if max(accumulate, phase.times) > 1:
    from trainer.accumulation import accumulated, parts
    run = accumulated(gradients, phase, stop, accumulate) if accumulate > 1 else run

  def once(carry, batch, rng, step):
    params, opt, extra = carry
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext():
      (loss, (extra, metrics)), grads = run(params, extra, batch, rng, step)
    own = part_of(params, phase.part)
    updates, opt = tx.update(grads, opt, own, phase=name)
    params = with_part(params, optax.apply_updates(own, updates))
    return (params, opt, extra), {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}

  def several(carry, batch, rng, step):
    carry, metrics = jax.lax.scan(
      lambda carry, part: once(carry, part[1], jax.random.fold_in(rng, part[0]), step), carry,
      (jnp.arange(phase.times), parts(batch, phase.times)))
    return carry, jax.tree.map(lambda x: x.mean(0), metrics)

  return once if phase.times == 1 else several


def of_all(metrics: dict[str, dict]) -> dict:
  """The metrics of a step from those of its phases; of a method of one loss they are its own."""
  if "" in metrics:
    return metrics[""]
  named = {f"{name}/{key}": x for name, own in metrics.items() for key, x in own.items()}
  return {"loss": sum(own["loss"] for own in metrics.values()), **named,
          "grad_norm": optax.tree.norm([own["grad_norm"] for own in metrics.values()])}


def make_step(method, tx, augment_batch: Callable, *, seed: int, accumulate: int = 1,
              ema_decay: float = 0.0, ema_gamma: float = 0.0,
              stop: Callable = lambda params: params, mesh=None) -> Callable:
  """(state, batch) -> (state, metrics), to be jitted with the state donated.

  `mesh` is where it will run, for models that say how activations are split; `stop` takes the
  gradient from parameters that are not trained. The running average decays by `ema_decay` a step;
  or, with `ema_gamma`, by (1 - 1/t)^(gamma + 1) at step t, which weighs the past in proportion to
  t^gamma (2312.02696 sec. 3.1).

  All randomness follows from (seed, step). With `accumulate` > 1 the gradient is averaged over so
  many parts of the batch, one after another: each example's augmentation and draws stay what they
  are in the whole batch. The average of the parameters is taken after all phases.
  """
  root = jax.random.fold_in(jax.random.key(seed), 1)
  phases, tx = method.turns, optax.with_extra_args_support(tx)
  turns = {name: make_turn(name, phase, tx, accumulate, stop, mesh)
           for name, phase in phases.items()}

  def key_of(loss_key, index):
    return loss_key if len(phases) == 1 else jax.random.fold_in(loss_key, index)

  def own_statistics(ema, ema_statistics, extra, batch, loss_key, step):
    """Those of the averaged network after it has seen the batch, or a part, as in training."""
    extra = with_statistics(method, extra, ema_statistics)
    for index, phase in enumerate(phases.values()):
      part = jax.tree.map(lambda x, n=accumulate * phase.times: x[::n], batch)
      _, (extra, _) = phase.loss(ema, extra, part, key_of(loss_key, index), step)
    return statistics(method, extra)

  def step(state: TrainState, batch):
    augment_key, draw_key, loss_key = jax.random.split(jax.random.fold_in(root, state.step), 3)
    batch = method.draw(draw_key, augment_batch(augment_key, batch))
    carry, metrics = (state.params, state.opt, state.extra), {}
    for index, (name, turn) in enumerate(turns.items()):
      carry, metrics[name] = turn(carry, batch, key_of(loss_key, index), state.step)
    params, opt, extra = carry
    ema, ema_statistics = state.ema, state.ema_statistics
    if ema is not None:
      decay = (1 - 1 / (state.step + 1)) ** (ema_gamma + 1) if ema_gamma else ema_decay
      ema = optax.incremental_update(params, ema, 1 - decay)
    if ema_statistics:
      ema_statistics = jax.lax.cond(
        (state.step < STATISTICS_AT_FIRST) | (state.step % STATISTICS_EVERY == 0), own_statistics,
        lambda *_: ema_statistics, ema, ema_statistics, extra, batch, loss_key, state.step)
    return TrainState(state.step + 1, params, opt, extra, ema, ema_statistics), of_all(metrics)

  return step


def make_predict(method, weights: Callable, out_sharding=None) -> Callable:
  """(name, batch, rng=None) -> NumPy outputs for one batch; `weights` is () -> (params, extra)."""
  compiled = {name: jax.jit(function, out_shardings=out_sharding)
              for name, function in method.predict.items()}

  def predict(name, batch, rng=None):
    if name not in compiled:
      raise ValueError(f"no prediction {name!r}: {nearest(name, sorted(compiled))}")
    rng = jax.random.key(0) if rng is None else rng
    batch = {key: jnp.asarray(x) for key, x in batch.items()}
    return jax.tree.map(np.asarray, compiled[name](*weights(), batch, rng))

  return predict
