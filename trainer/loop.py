"""The training loop, the same for every method.

Batch n is a function of (seed, n), and so is the randomness of step n. Nothing else is carried from
step to step than the TrainState.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from input_pipeline.records import BadRecord
from trainer import evaluation, fields, lease, networks, sharding, store
from trainer import recipe as recipes
from trainer.logging import Reporter, duration, print_evaluations
from trainer.preemption import Preempted, Signals, before
from trainer.program import abstract_state as abstract_state
from trainer.program import compiled_step as compiled_step
from trainer.program import describe as describe
from trainer.program import initial_state as initial_state
from trainer.program import jitted_step as jitted_step
from trainer.program import model_flops as model_flops
from trainer.same_run import check_same_run as check_same_run
from trainer.same_run import keep_facts, keep_tokenizer
from trainer.state import statistics
from trainer.store import TrainingError as TrainingError

log = logging.getLogger("vitrine")


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
  check_same_run(workdir, facts["config"], recipe)
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
    from trainer import continued
    continued.check_same_data(workdir, saved_facts, facts)
  else:
    state = jax.jit(init, out_shardings=shardings,
                    compiler_options=sharding.compiler_options(recipe.mesh))()
    state = transfer.put(state, taken, recipe.method) if taken else state
  return Start(state, step, facts, init, abstract, shardings, kept, compiling, taken)


class NotFinite(TrainingError):
  """The loss or the gradient is not finite: what came of it is not saved."""


def may_skip(error: Exception, config) -> str:
  """The flag that passes over a record that cannot be read; "" where that is not what is wrong."""
  is_record = isinstance(error, BadRecord) and config.data.get("on_error") != "skip"
  return " (or --config.data.on_error=skip)" if is_record else ""


class Training:
  """A run under way: what its steps, evaluations, log and checkpoints share."""

  def __init__(self, recipe: recipes.Recipe, workdir: Path, command: str, changed: Sequence[str],
               own: lease.Lease | None):
    self.own = own
    self.began, self.recipe, self.workdir = time.monotonic(), recipe, workdir
    config, batch_size = recipe.config, recipe.config.data.batch_size
    start = start_of(recipe, workdir)
    self.state, self.kept = start.state, start.kept
    self.step = self.at = start.step  # the one under way; the one that `state` is of
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
    self.stepped = False  # whether a step was taken in this process
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

  def first(self):
    """(the compiled step, the first batch): what may take long before the first step."""
    step_fn = self.timed("compilation", self.compiling.result)
    return step_fn, self.timed("input wait", self.next_batch)

  def next_batch(self):
    return sharding.to_device(next(self.batches), self.recipe.config.data.batch_size,
                              self.recipe.mesh)

  def fetch(self, step: int) -> dict[str, float]:
    """The metrics of a step, once all up to it are known to be finite."""
    while self.unchecked and self.unchecked[0][0] <= step:
      at, metrics = self.unchecked.pop(0)
      metrics = {name: float(x) for name, x in sorted(jax.device_get(metrics).items(),
                                                      key=lambda item: item[0] != "loss")}
      text = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
      if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
        self.kept.finish()
        raise NotFinite(
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

  def evaluate_if_due(self, step: int, signals: Signals):
    # A continued run may have it.
    if not self.evaluation_due(step) or sharding.agreed(step in self.report.evaluations):
      return

    def finish(name):
      self.save(step, is_busy=True)
      self.kept.finish()
      return f"stopped by {name} in the evaluation at step {step:,}; {self.saved()}"
    metrics = self.timed("evaluation", signals.at_once,
                         lambda: self.evaluate(step, step == self.recipe.total), finish)
    self.report.evaluation(step, metrics)
    self.report.restart_clock(step)

  def take_step(self, step: int, step_fn: Callable, batch):
    """One step of the device, and the log of the one before it while it runs."""
    with jax.transfer_guard("disallow"):
      self.state, metrics = step_fn(self.state, batch)
    if not self.stepped:
      jax.block_until_ready(metrics)
      self.report.restart_clock(step)
    self.at, self.stepped = step, True
    self.unchecked.append((step, metrics))
    if self.waiting:  # fetched only now that the next step is running: the device never waits
      self.log(self.waiting)

  def save(self, step: int, is_busy: bool = False):
    if self.own and self.own.lost:
      raise TrainingError(f"{self.workdir} was taken over by {self.own.lost}: this process stood "
                          "still for so long as to seem dead, and writes nothing more")
    if self.unchecked:
      self.fetch(step)  # what is saved is finite
    self.timed("checkpoints", self.kept.save, self.state, step, is_busy)
    self.report.restart_clock(step)

  def saved(self) -> str:
    steps = self.kept.steps()
    return f"step {steps[-1]:,} is saved in {self.kept.directory}" if steps else "nothing is saved"

  def run(self, signals: Signals):
    """All steps that are left, with what is due between them."""
    start, total = self.step, self.recipe.total
    self.evaluate_if_due(start, signals)
    if start < total:
      step_fn, batch = signals.at_once(
        self.first, lambda name: f"stopped by {name} before step {start + 1:,}; {self.saved()}")
    for step in range(start + 1, total + 1):
      self.step = step
      self.take_step(step, step_fn, batch)
      last, stop = step == total, signals.requested(step)
      self.waiting = step if step % self.recipe.log_every == 0 or last else None
      saves = self.kept.due(step) or last or stop
      if self.waiting and (saves or self.evaluation_due(step)):  # the device stops for these anyhow
        self.log(step)
        self.waiting = None
      if saves:
        self.save(step)
      if stop or last:  # whole before an evaluation that may take long, or fill the disk
        self.timed("checkpoints", self.kept.finish)
      if stop and not last:
        raise Preempted(f"stopped by {stop} after step {step:,} of {total:,}; it is saved "
                        f"in {self.kept.directory}")
      self.evaluate_if_due(step, signals)
      if not last:
        batch = self.timed("input wait", self.next_batch)
    self.timed("checkpoints", self.kept.finish)

  def ended_by(self, error: Exception) -> TrainingError:
    """Saves the state, whatever ended the run, and says in the error to raise how to go on."""
    name = getattr(error, "evaluation", None)
    known = isinstance(error, TrainingError | ValueError | OSError)
    if not known:  # not the user's to mend, so not the place for few words
      log.error("what ended the run:", exc_info=error)
    said = str(error) if known else store.first_line(error)
    where = f"evaluation at step {self.at:,}: " if name else ""
    flag = may_skip(error, self.recipe.config) or (
      f" (or --config.evals.{name}=none)" if name else "")
    return TrainingError(
      f"{where}{said}. {self.rescued()}; continue with the same command{flag}")

  def rescued(self) -> str:
    """Saves the last state if it is whole and finite. Returns what is saved now."""
    try:
      deleted = any(x.is_deleted() for x in jax.tree.leaves(self.state))
      # What ended one of several processes did not end the others: they save nothing together.
      if self.stepped and not deleted and jax.process_count() == 1:
        if self.waiting == self.at:
          self.log(self.at)
        self.save(self.at)
      self.kept.finish()
    except Exception as worse:  # the disk is full: what is said is of the first error
      return f"{store.first_line(worse)}; {self.saved()}"
    return self.saved()

  def close(self) -> str:
    """Closes what is open, however the run ended. Returns where its report is."""
    failed = None
    for part in (self.batches, self.kept, self.report):
      try:
        part.close()
      except (OSError, store.CheckpointError) as error:
        failed = failed or error
    self.wall = time.monotonic() - self.began
    self.spent["steps and logging"] = self.wall - sum(self.spent.values())
    page, ending = None, sys.exc_info()[1]
    if self.report.writes:
      from trainer import report
      page = report.update(self.workdir, "stop", step=self.step, spent=self.spent,
                           reason=str(ending or failed or ""))
    if failed and not ending:
      raise failed
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


def train(recipe: recipes.Recipe, workdir, command: str = "", changed: Sequence[str] = (),
          signals: Signals | None = None) -> dict[str, float]:
  """Trains to the end, continuing the run in `workdir` if there is one.

  `command` and `changed`, the differences from the recipe's defaults, are for the run's report.
  `signals` are listened to already; None: from here on.

  Returns the final evaluation's metrics.

  Raises:
    TrainingError: the workdir holds another run or is in use, a record cannot be read, the loss is
      not finite, or whatever else: but where it is not finite the state is saved.
    CheckpointError: a checkpoint could not be written, or all there are damaged.
    Preempted: SIGTERM or SIGINT; the state is saved.
  """
  workdir = Path(workdir)
  with contextlib.ExitStack() as stack:
    if signals is None:
      signals = stack.enter_context(contextlib.closing(Signals(command)))
    try:
      run = signals.at_once(
        lambda: Training(recipe, workdir, command, changed,
                         stack.enter_context(lease.hold(workdir))), before)
    except (lease.InUse, OSError, BadRecord) as error:
      raise TrainingError(f"{error}{may_skip(error, recipe.config)}") from error
    try:
      run.run(signals)
    except (Preempted, NotFinite, store.CheckpointError):
      raise
    except Exception as error:
      raise run.ended_by(error) from error
    finally:
      page = run.close()
    return run.conclude(page)
