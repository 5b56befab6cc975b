"""The training state and one step on it: gradient, accumulation, optimizer, EMA."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


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
  are in the whole batch.
  """
  root = jax.random.fold_in(jax.random.key(seed), 1)

  def gradients(params, extra, batch, rng, step):
    """((loss, (extra, metrics)), gradients) of one part."""
    def loss(params, *rest):
      return method.loss(stop(params), *rest)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext():
      return jax.value_and_grad(loss, has_aux=True)(params, extra, batch, rng, step)

  def accumulated(params, extra, batch, rng, step):
    # Part j takes rows j, j + accumulate, ...: so each device keeps its own rows.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def one(carry, part):
      extra, grads = carry
      index, part = part
      (loss, (extra, metrics)), new = gradients(params, extra, part,
                                                jax.random.fold_in(rng, index), step)
      return (extra, jax.tree.map(jnp.add, grads, new)), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (extra, grads), (loss, metrics) = jax.lax.scan(
      one, (extra, zeros), (jnp.arange(accumulate), parts))
    mean = jax.tree.map(lambda x: x.mean(0), (loss, metrics))
    return (mean[0], (extra, mean[1])), jax.tree.map(lambda g: g / accumulate, grads)

  def own_statistics(ema, ema_statistics, extra, batch, rng, step):
    """Those of the averaged network after it has seen the batch, or a part, as in training."""
    extra = with_statistics(method, extra, ema_statistics)
    part = jax.tree.map(lambda x: x[::accumulate], batch)
    _, (extra, _) = method.loss(ema, extra, part, rng, step)
    return statistics(method, extra)

  def step(state: TrainState, batch):
    augment_key, draw_key, loss_key = jax.random.split(jax.random.fold_in(root, state.step), 3)
    batch = method.draw(draw_key, augment_batch(augment_key, batch))
    run = gradients if accumulate == 1 else accumulated
    (loss, (extra, metrics)), grads = run(state.params, state.extra, batch, loss_key, state.step)
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    ema, ema_statistics = state.ema, state.ema_statistics
    if ema is not None:
      decay = (1 - 1 / (state.step + 1)) ** (ema_gamma + 1) if ema_gamma else ema_decay
      ema = optax.incremental_update(params, ema, 1 - decay)
    if ema_statistics:
      ema_statistics = jax.lax.cond(
        (state.step < STATISTICS_AT_FIRST) | (state.step % STATISTICS_EVERY == 0), own_statistics,
        lambda *_: ema_statistics, ema, ema_statistics, extra, batch, loss_key, state.step)
    metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt, extra, ema, ema_statistics), metrics

  return step
