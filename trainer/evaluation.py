"""Runs evaluators: gives them predictions over whole splits, from any mesh."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer import fields, sharding
from trainer.state import make_init, make_predict, with_statistics


class Context(NamedTuple):
  """What an evaluator gets: predictions, facts of the data, a place for figures."""

  # (name, split, *keys, params="trained", limit=None, first=None) -> (outputs, {key: array})
  collect: Callable
  predict: Callable  # (name, batch, rng=None) -> NumPy outputs for one batch of ready images
  predictions: frozenset[str]  # the names there are
  info: Any  # input_pipeline.records.Info
  train_split: str
  eval_split: str
  to_pixels: Callable  # ready images -> NumPy, 0 is black and 1 white
  figures: Path
  step: int
  final: bool  # training is over
  seed: int
  tokenize: Callable | None  # captions -> int32 [n, l]; None where the data has no text
  detokenize: Callable | None  # int [l] -> caption
  load_run: Callable  # run directory -> checkpoints.Run


def make_collect(recipe, weights: Mapping[str, Callable]) -> Callable:
  """The `collect` of a Context.

  `weights` maps "trained" and "untrained" to functions () -> (params, extra). Predictions run on
  the mesh, each process reading its share, and come back whole to every process.
  """
  method, mesh = recipe.method, recipe.mesh
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  batch_size = -(-recipe.config.eval_batch_size // ways) * ways

  @functools.cache
  def compiled(name, keys):
    def run(params, extra, batch, rng):
      batch = recipe.augment.eval(batch)
      if name == "pixels":
        out = batch["image"].reshape(batch["image"].shape[0], -1)
      else:
        out = method.predict[name](params, extra, batch, rng)
      return out, {key: batch[key] for key in (*keys, "valid")}
    return jax.jit(run, out_shardings=sharding.replicated(mesh))

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    """Prediction `name` over a split, in order, each example once.

    `limit`: over so many of them, spread over the split; `first`: over the first of these alone.
    """
    most = min((n for n in (limit, first) if n is not None), default=None)
    if name != "pixels" and name not in method.predict:
      raise ValueError(f"no prediction {name!r}: {fields.nearest(name, sorted(method.predict))}")
    variables = weights[params]() if params else ({}, {})
    rows, parts, count = sharding.local_rows(batch_size, mesh), [], 0
    for index, batch in enumerate(recipe.data.eval(split, batch_size, rows, limit)):
      missing = [key for key in keys if key not in batch]
      if missing:
        raise ValueError(f"the data has no {missing[0]!r}; it has {', '.join(sorted(batch))}")
      out, kept = jax.device_get(compiled(name, keys)(
        *variables, sharding.to_device(batch, batch_size, mesh),
        jax.random.fold_in(jax.random.key(0), index)))
      valid = kept.pop("valid")
      parts.append(jax.tree.map(lambda x, valid=valid: x[valid], (out, kept)))
      count += int(valid.sum())
      if most is not None and count >= most:
        break
    return jax.tree.map(lambda *x: np.concatenate(x)[:most], *parts)

  return collect


def load_run(workdir):
  """`checkpoints.load_run`, of use to the evaluators that look at other runs."""
  from trainer import checkpoints
  return checkpoints.load_run(workdir)


def make_evaluate(recipe, workdir, weights: Mapping[str, Callable]) -> Callable:
  """(step, final) -> metrics of every evaluator in `config.evals`, named EVALUATOR/METRIC.

  Baselines (the untrained network, raw pixels) never change, so they run at the end only.
  """
  collect = make_collect(recipe, weights)
  predict = make_predict(recipe.method, weights["trained"], sharding.replicated(recipe.mesh))
  config, data = recipe.config, recipe.data

  def evaluate(step: int, final: bool) -> dict[str, float]:
    context = Context(collect, predict, frozenset(recipe.method.predict), data.info,
                      data.train_split, data.eval_split, recipe.augment.to_pixels,
                      Path(workdir) / "figures", step, final, config.seed,
                      data.tokenizer and data.tokenizer.encode,
                      data.tokenizer and data.tokenizer.decode, load_run)
    metrics = {}
    for label, section in config.evals.items():
      section = section.to_dict()
      module = fields.find_module("evaluators", section.pop("name", label), f"config.evals.{label}")
      if not final:
        section.pop("baselines", None)
      try:
        result = fields.call(module.evaluate, section, f"evals.{label}", context=context)
      except Exception as error:
        error.evaluation = label  # for who tells of it
        raise
      metrics.update({f"{label}/{key}": float(value) for key, value in result.items()})
    return metrics

  return evaluate


def weights_of(recipe, init, shardings, get_state) -> dict:
  """What evaluators evaluate: "trained" (the running average if kept) and "untrained"."""
  def trained():
    state = get_state()
    if state.ema is None:
      return state.params, state.extra
    return state.ema, with_statistics(recipe.method, state.extra, state.ema_statistics)

  initial = jax.jit(lambda: (init().params, init().extra),
                    out_shardings=(shardings.params, shardings.extra))
  return {"trained": trained, "untrained": initial}


def evaluate_run(run, recipe, workdir) -> dict[str, float]:
  """All evaluations of a loaded run, baselines included, on all devices there are."""
  def spread(params, extra):
    return jax.device_put((params, extra), sharding.shard_state((params, extra), recipe.mesh))

  trained = spread(run.params, run.extra)

  def untrained():
    init = make_init(recipe.method, recipe.tx, recipe.augment.eval, recipe.data.spec,
                     recipe.config.seed, with_ema=False)
    return spread(*jax.jit(lambda: (init().params, init().extra))())

  weights = {"trained": lambda: trained, "untrained": untrained}
  return make_evaluate(recipe, workdir, weights)(run.step, True)
