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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from trainer import evaluation, fields, networks, sharding, store
from trainer import recipe as recipes
from trainer import report as reports
from trainer.logging import Reporter, duration, print_evaluations
from trainer.optimizer import stop_frozen
from trainer.preemption import Preempted, listen
from trainer.state import make_init, make_step, phase_gradient, statistics, with_statistics

# Fields that do not change what is computed: a run may be continued with others.
FREE = ("mesh.", "checkpoint.", "evals.", "eval_", "log_every_", "wandb", "expect",
        "data.workers", "data.cache_bytes", "data.prefetch_batches", "data.tokenizer",
        "augment.eval_crop", "augment.eval_squash")
log = logging.getLogger("vitrine")


class TrainingError(RuntimeError):
  """Training stopped for a reason the user has to know; nothing already saved is lost."""


def check_same_run(workdir: Path, config: dict):
  """Writes config.json, or compares with the one there. Raises TrainingError if they differ."""
  path = workdir / "config.json"
  if path.exists():
    then = recipes.plain(store.load_config(workdir))
    lines = [line for line in recipes.differences(then, config)
             if not line.removeprefix("config.").startswith(FREE)]
    if lines:
      raise TrainingError(f"{workdir} holds a run with another config; choose another --workdir or "
                          "remove it. Its config differs in\n  " + "\n  ".join(lines))
  elif jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(path)


def keep_tokenizer(path: Path, now: str):
  """Writes a run's tokenizer, or raises TrainingError if another is there."""
  if path.exists():
    if path.read_text() != now:
      raise TrainingError(f"the tokenizer is not that of {path}; give it, "
                          f"--config.data.tokenizer={path}, to continue the run with it")
  elif jax.process_index() == 0:
    path.write_text(now)


def check_same_data(workdir: Path, saved: dict, now: dict):
  """Raises TrainingError if the run was trained on other data; warns if by other code."""
  if saved["data"] != now["data"]:
    raise TrainingError(f"the data is not what {workdir} was trained on: fingerprint {now['data']} "
                        f"now, {saved['data']} then. A continued run would not be the same run")
  if saved["code"] != now["code"]:
    log.warning("%s was saved by version %s of the code, this is %s: the continued run may differ "
                "from an unbroken one", workdir, saved["code"], now["code"])


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


def describe(recipe, state, start: int, workdir) -> dict[str, str]:
  """What is trained, on what: the lines shown at the start."""
  config, info, devices = recipe.config, recipe.data.info, jax.devices()
  train_size, batch_size = info.num_examples[recipe.data.train_split], config.data.batch_size
  return {
    "recipe": f"{config.config_name}: method {config.method.name}, model {config.model.name} "
              + str(config.model.get("variant") or ""),
    "data": f"{config.data.source}: " + ", ".join(
      f"{n:,} {split}" for split, n in info.num_examples.items()) + " images",
    "devices": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()}), mesh "
               + ", ".join(f"{name} {size}" for name, size in recipe.mesh.shape.items()),
    "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
    "model FLOPs": f"{model_flops(recipe, state):.3g} a step of {batch_size} examples",
    "steps": f"{recipe.total:,} ({recipe.total * batch_size / train_size:.1f} epochs)"
             + (f", continuing from step {start:,}" if start else ""),
    "expected": config.expect or "not measured; README.md lists the recipes that are",
    "run directory": str(workdir)}


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
  began, workdir = time.monotonic(), Path(workdir)
  config, mesh = recipe.config, recipe.mesh
  batch_size = config.data.batch_size

  # --- The state: from the newest checkpoint, or new ----------------------------------------------
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
  if recipe.data.tokenizer:
    keep_tokenizer(workdir / store.TOKENIZER, recipe.data.tokenizer.to_json())
  kept = fields.call(store.Checkpoints, recipe.checkpoint, "checkpoint", workdir=workdir,
                     metadata=facts)
  restored = kept.restore(abstract, {
    "ema_statistics": lambda items: statistics(recipe.method, items["extra"])})
  start = int(restored[0].step) if restored else 0
  if start < recipe.total:
    compiler = ThreadPoolExecutor(1)  # beside what is done until the first step
    compiling = compiler.submit(compiled_step, recipe, abstract, shardings)
    compiler.shutdown(wait=False)
  if restored:
    state, saved_facts = restored
    check_same_data(workdir, saved_facts, facts)
  else:
    state = jax.jit(init, out_shardings=shardings,
                    compiler_options=sharding.compiler_options(mesh))()
    state = transfer.put(state, taken, recipe.method) if taken else state

  # --- What runs on the mesh, and what tells of it ------------------------------------------------
  evaluate = evaluation.make_evaluate(
    recipe, workdir, weights_of(recipe, init, shardings, lambda: state))
  batches = recipe.data.train(start, recipe.total, sharding.local_rows(batch_size, mesh))
  report = Reporter(workdir, start=start, total=recipe.total, batch_size=batch_size,
                    writes=jax.process_index() == 0, wandb=config.wandb,
                    config=facts["config"])
  shown = describe(recipe, abstract, start, workdir)
  report.facts(shown)
  if taken:
    runs = filter(None, (config.init.get(name) for name in ("run", "text_run")))
    report.table(f"from {' and '.join(runs)}", ("parameters", "", "became"),
                 transfer.summary(taken.rows))
  if report.writes:
    reports.update(workdir, "start", step=start, command=command, changed=list(changed),
                   facts=shown | {"code": facts["code"]})
  spent = dict.fromkeys(("start", "compilation", "input wait", "evaluation", "checkpoints"), 0.0)
  unchecked, warned, last_finite = [], [], "none"

  def timed(name, function, *args):
    before = time.monotonic()
    result = function(*args)
    spent[name] += time.monotonic() - before
    return result

  def next_batch():
    try:
      return sharding.to_device(next(batches), batch_size, mesh)
    except (ValueError, OSError) as error:  # a record that cannot be read, named in the message
      raise TrainingError(str(error)) from error

  def fetch(step):
    """The metrics of a step, once all up to it are known to be finite."""
    nonlocal last_finite
    while unchecked and unchecked[0][0] <= step:
      at, metrics = unchecked.pop(0)
      metrics = {name: float(x) for name, x in sorted(jax.device_get(metrics).items(),
                                                      key=lambda item: item[0] != "loss")}
      text = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
      if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
        kept.finish()
        raise TrainingError(
          f"not finite at step {at}: {text}\n  last finite metrics: {last_finite}\n  last good "
          f"checkpoint: {(kept.steps() or ['none'])[-1]} in {kept.directory}")
      last_finite = f"step {at}, {text}"
    return {f"train/{name}": value for name, value in metrics.items()}

  def log_step(step):
    metrics = fetch(step)
    rates = {"": recipe.rate, **{f"_{name}": rate for name, rate in recipe.rate.groups.items()}}
    report.train(step, metrics | {f"train/lr{name}": float(rate(step - 1))
                                  for name, rate in rates.items()})
    text = recipe.method.warn({name.removeprefix("train/"): x for name, x in metrics.items()})
    if text and not warned:
      warned.append(text)
      log.warning("step %s: %s", step, text)

  def evaluation_due(step):
    return step == recipe.total or (
      bool(recipe.eval_every) and step > 0 and step % recipe.eval_every == 0)

  def evaluate_if_due(step):
    # A continued run may have it.
    if evaluation_due(step) and not sharding.agreed(step in report.evaluations):
      try:
        metrics = timed("evaluation", evaluate, step, step == recipe.total)
      except (ValueError, FileNotFoundError) as error:  # an evaluator that this run cannot have
        raise TrainingError(f"evaluation at step {step}: {error}") from error
      report.evaluation(step, metrics)
      report.restart_clock(step)

  spent["start"] = time.monotonic() - began
  requested, restore_handlers = listen()
  step = start
  try:
    evaluate_if_due(start)
    to_log = None
    for step in range(start + 1, recipe.total + 1):
      batch = timed("input wait", next_batch)
      step_fn = timed("compilation", compiling.result)  # waited for at the first step alone
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch)
      if step == start + 1:
        jax.block_until_ready(metrics)
        report.restart_clock(step)
      unchecked.append((step, metrics))
      if to_log:  # fetched only now that the next step is running: the device never waits for it
        log_step(to_log)
      last, stop = step == recipe.total, requested(step)
      to_log = step if step % recipe.log_every == 0 or last else None
      saves = kept.due(step) or last or stop
      if to_log and (saves or evaluation_due(step)):  # the device stops for these anyhow
        log_step(to_log)
        to_log = None
      if saves:
        if unchecked:
          fetch(step)  # what is saved is finite
        timed("checkpoints", kept.save, state, step)
        report.restart_clock(step)
      if stop and not last:
        kept.finish()
        raise Preempted(f"stopped by {stop} after step {step:,} of {recipe.total:,}; it is saved "
                        f"in {kept.directory}")
      evaluate_if_due(step)
    timed("checkpoints", kept.finish)
  finally:
    restore_handlers()
    batches.close()
    kept.close()
    report.close()
    wall = time.monotonic() - began
    spent["steps and logging"] = wall - sum(spent.values())
    page = report.writes and reports.update(workdir, "stop", step=step, spent=spent,
                                            reason=str(sys.exc_info()[1] or ""))

  # --- What a person wants to know at the end -----------------------------------------------------
  final = report.evaluations.get(recipe.total, {})
  print_evaluations(final, report.console)
  report.facts({
    "wall time": duration(wall) + ": " + ", ".join(
      f"{name} {seconds:.1f} s ({100 * seconds / wall:.1f}%)" for name, seconds in spent.items()),
    "figures": ", ".join(map(str, sorted((workdir / "figures").glob("*.png")))) or "none",
    "report": str(page or "none"),
    "evaluate": f"python evaluate.py --workdir={workdir}",
    "continue": f"the same command again, with --workdir={workdir}"})
  return final
