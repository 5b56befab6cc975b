"""The training loop, the same for every method.

Batch n is a function of (seed, n), and so is the randomness of step n. Nothing else is carried from
step to step than the TrainState.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer import evaluation, fields, networks, sharding, store
from trainer import recipe as recipes
from trainer.logging import Reporter, duration, print_evaluations
from trainer.optimizer import stop_frozen
from trainer.preemption import Preempted, listen
from trainer.same_run import (
  TrainingError,
  check_same_data,
  check_same_run,
  keep_facts,
  keep_tokenizer,
)
from trainer.state import make_init, make_step, phase_gradient, statistics

log = logging.getLogger("vitrine")


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


class Start(NamedTuple):
  """What a run goes on from."""

  state: Any  # from the newest checkpoint, or new
  step: int
  facts: dict  # plain: config, code, data
  init: Callable  # () -> TrainState at step 0
  abstract: Any  # shapes of the state, with their shardings
  shardings: Any
  kept: store.Checkpoints
  compiling: Future | None  # of the step; None where no step is left
  taken: Any  # transfer.Taken, of another run, or None


def start_of(recipe, workdir: Path) -> Start:
  """Checks that the run fits what is in `workdir`, and gets its state. Raises as `train`."""
  config = recipe.config
  facts = {"config": recipes.plain(config), "code": store.code_version(),
           "data": recipe.data.info.fingerprint}
  sharding.check_agreement({name: json.dumps(fact) for name, fact in facts.items()})
  init = initial_state(recipe)
  try:
    abstract, shardings = abstract_state(recipe, init)
    taken = None
    if config.init and not store.exist(workdir):
      from trainer import transfer
      taken = transfer.take(config, abstract, recipe.method,
                            **fields.arguments(networks.Init, config.init, "init"))
  except (ValueError, FileNotFoundError) as error:  # what only the parameters' shapes can tell
    raise TrainingError(str(error)) from error
  check_same_run(workdir, facts["config"])
  keep_facts(workdir, recipe.data.info)
  if recipe.data.tokenizer:
    keep_tokenizer(workdir / store.TOKENIZER, recipe.data.tokenizer.to_json())
  kept = fields.call(store.Checkpoints, recipe.checkpoint, "checkpoint", workdir=workdir,
                     metadata=facts)
  restored = kept.restore(abstract, {
    "ema_statistics": lambda items: statistics(recipe.method, items["extra"])})
  step, compiling = int(restored[0].step) if restored else 0, None
  if step < recipe.total:
    compiler = ThreadPoolExecutor(1)  # beside what is done until the first step
    compiling = compiler.submit(compiled_step, recipe, abstract, shardings)
    compiler.shutdown(wait=False)
  if restored:
    state, saved_facts = restored
    check_same_data(workdir, saved_facts, facts)
  else:
    state = jax.jit(init, out_shardings=shardings,
                    compiler_options=sharding.compiler_options(recipe.mesh))()
    state = transfer.put(state, taken, recipe.method) if taken else state
  return Start(state, step, facts, init, abstract, shardings, kept, compiling, taken)


class Training:
  """A run under way: what its steps, evaluations, log and checkpoints share."""

  def __init__(self, recipe: recipes.Recipe, workdir: Path, command: str, changed: Sequence[str]):
    self.began, self.recipe, self.workdir = time.monotonic(), recipe, workdir
    config, batch_size = recipe.config, recipe.config.data.batch_size
    start = start_of(recipe, workdir)
    self.state, self.step, self.kept = start.state, start.step, start.kept
    self.compiling, self.waiting = start.compiling, None
    weights = evaluation.weights_of(recipe, start.init, start.shardings, lambda: self.state)
    self.evaluate = evaluation.make_evaluate(recipe, workdir, weights)
    self.batches = recipe.data.train(start.step, recipe.total,
                                     sharding.local_rows(batch_size, recipe.mesh))
    self.report = Reporter(workdir, start=start.step, total=recipe.total, batch_size=batch_size,
                           writes=jax.process_index() == 0, wandb=config.wandb,
                           config=start.facts["config"])
    self.spent = dict.fromkeys(
      ("start", "compilation", "input wait", "evaluation", "checkpoints"), 0.0)
    self.unchecked, self.warned, self.last_finite = [], False, "none"
    self.tell(start, command, changed)
    self.spent["start"] = time.monotonic() - self.began

  def tell(self, start: Start, command: str, changed: Sequence[str]):
    """Shows what is trained, and notes it for the report."""
    shown = describe(self.recipe, start.abstract, start.step, self.workdir)
    self.report.facts(shown)
    if start.taken:
      from trainer import transfer
      runs = filter(None, (self.recipe.config.init.get(name) for name in ("run", "text_run")))
      self.report.table(f"from {' and '.join(runs)}", ("parameters", "", "became"),
                        transfer.summary(start.taken.rows))
    if self.report.writes:
      from trainer import report
      report.update(self.workdir, "start", step=start.step, command=command, changed=list(changed),
                    facts=shown | {"code": start.facts["code"]})

  def timed(self, name: str, function: Callable, *args):
    before = time.monotonic()
    result = function(*args)
    self.spent[name] += time.monotonic() - before
    return result

  def next_batch(self):
    try:
      return sharding.to_device(next(self.batches), self.recipe.config.data.batch_size,
                                self.recipe.mesh)
    except (ValueError, OSError) as error:  # a record that cannot be read, named in the message
      raise TrainingError(str(error)) from error

  def fetch(self, step: int) -> dict[str, float]:
    """The metrics of a step, once all up to it are known to be finite."""
    while self.unchecked and self.unchecked[0][0] <= step:
      at, metrics = self.unchecked.pop(0)
      metrics = {name: float(x) for name, x in sorted(jax.device_get(metrics).items(),
                                                      key=lambda item: item[0] != "loss")}
      text = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
      if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
        self.kept.finish()
        raise TrainingError(
          f"not finite at step {at}: {text}\n  last finite metrics: {self.last_finite}\n  last "
          f"good checkpoint: {(self.kept.steps() or ['none'])[-1]} in {self.kept.directory}")
      self.last_finite = f"step {at}, {text}"
    return {f"train/{name}": value for name, value in metrics.items()}

  def log(self, step: int):
    metrics, rate = self.fetch(step), self.recipe.rate
    rates = {"": rate, **{f"_{name}": own for name, own in rate.groups.items()}}
    self.report.train(step, metrics | {f"train/lr{name}": float(rate(step - 1))
                                       for name, rate in rates.items()})
    text = self.recipe.method.warn({name.removeprefix("train/"): x for name, x in metrics.items()})
    if text and not self.warned:
      self.warned = True
      log.warning("step %s: %s", step, text)

  def evaluation_due(self, step: int) -> bool:
    every = self.recipe.eval_every
    return step == self.recipe.total or (bool(every) and step > 0 and step % every == 0)

  def evaluate_if_due(self, step: int):
    # A continued run may have it.
    if self.evaluation_due(step) and not sharding.agreed(step in self.report.evaluations):
      try:
        metrics = self.timed("evaluation", self.evaluate, step, step == self.recipe.total)
      except (ValueError, FileNotFoundError) as error:  # an evaluator that this run cannot have
        raise TrainingError(f"evaluation at step {step}: {error}") from error
      self.report.evaluation(step, metrics)
      self.report.restart_clock(step)

  def take_step(self, step: int, first: bool):
    """One step of the device, and the log of the one before it while it runs."""
    batch = self.timed("input wait", self.next_batch)
    step_fn = self.timed("compilation", self.compiling.result)  # waited for at the first step alone
    with jax.transfer_guard("disallow"):
      self.state, metrics = step_fn(self.state, batch)
    if first:
      jax.block_until_ready(metrics)
      self.report.restart_clock(step)
    self.unchecked.append((step, metrics))
    if self.waiting:  # fetched only now that the next step is running: the device never waits
      self.log(self.waiting)

  def save(self, step: int):
    if self.unchecked:
      self.fetch(step)  # what is saved is finite
    self.timed("checkpoints", self.kept.save, self.state, step)
    self.report.restart_clock(step)

  def run(self, requested: Callable):
    """All steps that are left, with what is due between them. `requested` is of `listen`."""
    start, total = self.step, self.recipe.total
    self.evaluate_if_due(start)
    for step in range(start + 1, total + 1):
      self.step = step
      self.take_step(step, first=step == start + 1)
      last, stop = step == total, requested(step)
      self.waiting = step if step % self.recipe.log_every == 0 or last else None
      saves = self.kept.due(step) or last or stop
      if self.waiting and (saves or self.evaluation_due(step)):  # the device stops for these anyhow
        self.log(step)
        self.waiting = None
      if saves:
        self.save(step)
      if stop and not last:
        self.kept.finish()
        raise Preempted(f"stopped by {stop} after step {step:,} of {total:,}; it is saved "
                        f"in {self.kept.directory}")
      self.evaluate_if_due(step)
    self.timed("checkpoints", self.kept.finish)

  def close(self) -> str:
    """Closes what is open, however the run ended. Returns where its report is."""
    self.batches.close()
    self.kept.close()
    self.report.close()
    self.wall = time.monotonic() - self.began
    self.spent["steps and logging"] = self.wall - sum(self.spent.values())
    if not self.report.writes:
      return "none"
    from trainer import report
    page = report.update(self.workdir, "stop", step=self.step, spent=self.spent,
                         reason=str(sys.exc_info()[1] or ""))
    return str(page or "none")

  def conclude(self, page: str) -> dict[str, float]:
    """Shows what a person wants to know at the end. Returns the final evaluation's metrics."""
    final = self.report.evaluations.get(self.recipe.total, {})
    print_evaluations(final, self.report.console)
    figures = sorted((self.workdir / "figures").glob("*.png"))
    self.report.facts({
      "wall time": duration(self.wall) + ": " + ", ".join(
        f"{name} {seconds:.1f} s ({100 * seconds / self.wall:.1f}%)"
        for name, seconds in self.spent.items()),
      "figures": ", ".join(map(str, figures)) or "none",
      "report": page,
      "evaluate": f"python evaluate.py --workdir={self.workdir}",
      "continue": f"the same command again, with --workdir={self.workdir}"})
    return final


def train(recipe: recipes.Recipe, workdir, command: str = "",
          changed: Sequence[str] = ()) -> dict[str, float]:
  """Trains to the end, continuing the run in `workdir` if there is one.

  `command` and `changed`, the differences from the recipe's defaults, are for the run's report.

  Returns the final evaluation's metrics.

  Raises:
    TrainingError: the workdir holds another run, a record cannot be read, the loss is not finite.
    CheckpointError: a checkpoint could not be written, or all there are damaged.
    Preempted: SIGTERM or SIGINT; the state is saved.
  """
  run = Training(recipe, Path(workdir), command, changed)
  requested, restore_handlers = listen()
  try:
    run.run(requested)
  finally:
    restore_handlers()
    page = run.close()
  return run.conclude(page)
