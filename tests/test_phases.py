"""Methods of several phases: a toy of two players against a loop of plain optax."""

import functools
import importlib.machinery
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import broken_off
from tiers import suite

import train
from methods import supervised
from methods.method import Method, Phase
from trainer import loop, optimizer, plan, recipe, sharding
from trainer.program import count_flops
from trainer.state import make_init, make_step

ROWS, STEPS, RATE = 16, 4, 0.05


def make_fake(params, z):
  return jnp.tanh(z @ params["generator"]["kernel"]) @ params["generator"]["out"]["kernel"]


def judge(params, x):
  return x @ params["critic"]["kernel"] + params["critic"]["bias"]


def critic_loss(params, extra, batch, rng, step):
  real, fake = judge(params, batch["x"]), judge(params, make_fake(params, batch["z"]))
  loss = jnp.mean((real - 1)**2) + jnp.mean(fake**2)
  return loss, ({"seen": extra["seen"] + batch["x"].shape[0], "mean": 0.9 * extra["mean"]
                 + 0.1 * fake.mean()}, {"real": real.mean()})


def generator_loss(params, extra, batch, rng, step):
  fake = judge(params, make_fake(params, batch["z"]))
  return jnp.mean((fake - 1)**2), ({**extra, "seen": extra["seen"] + 100}, {"fake": fake.mean()})


def toy(times=1, **changed):
  def init(rng, batch):
    keys = jax.random.split(rng, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape)  # noqa: E731
    return ({"critic": {"kernel": normal(keys[0], 3, 1), "bias": jnp.zeros(())},
             "generator": {"kernel": normal(keys[1], 2, 4),
                           "out": {"kernel": normal(keys[2], 4, 3)}}},
            {"seen": jnp.zeros((), jnp.int32), "mean": jnp.zeros(())})

  phases = {"critic": Phase(critic_loss, "^critic/", times),
            "generator": Phase(generator_loss, "^generator/")}
  return Method(init, None, {}, phases=phases)._replace(**changed)


def batch_of(step):
  rng = np.random.default_rng(step)
  return {"x": rng.normal(size=(ROWS, 3)).astype(np.float32),
          "z": rng.normal(size=(ROWS, 2)).astype(np.float32)}


SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(0).items()}
FALLING = optax.linear_schedule(1.0, 0.0, STEPS)


def make_tx(method, **section):
  return optimizer.make(schedule=FALLING, batch_size=ROWS, phases=method.turns, **{
    "lr": RATE, "weight_decay": 0.1, **section})[0]


def run(method, start=None, first=0, last=STEPS, ema_decay=0.0, accumulate=1, **section):
  """(metrics of each step, last state)."""
  tx = make_tx(method, **section)
  init = make_init(method, tx, lambda batch: batch, SPEC, 3, ema_decay > 0)
  state = start or jax.jit(init)()
  step = jax.jit(make_step(method, tx, lambda rng, batch: batch, seed=3, ema_decay=ema_decay,
                           accumulate=accumulate, stop=optimizer.stop_frozen(section)))
  history = []
  for n in range(first, last):
    state, metrics = step(state, batch_of(n))
    history.append(jax.device_get(metrics))
  return history, jax.device_get(state)


def by_hand(times=1, clip=None, make=optax.adamw):
  """The same training, every gradient and update written out; params after each step."""
  params, extra = toy().init(jax.random.fold_in(jax.random.key(3), 0), None)
  decays = lambda tree: jax.tree.map_with_path(  # noqa: E731
    lambda path, _: path[-1].key == "kernel", tree)
  # The rate falls from step to step, not from one of the critic's updates to the next.
  txs = {name: optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    make(lambda count, k=k: RATE * FALLING(count // k), weight_decay=0.1, mask=decays))
    for name, k in (("critic", times), ("generator", 1))}
  opt = {name: tx.init(params[name]) for name, tx in txs.items()}
  path, norms, losses = [params], [], []
  for step in range(STEPS):
    batch, norms_now, losses_now = batch_of(step), [], []
    for name, loss, k in (("critic", critic_loss, times), ("generator", generator_loss, 1)):
      for j in range(k):
        rows = {key: x[j::k] for key, x in batch.items()}
        (value, (extra, _)), grads = jax.value_and_grad(
          lambda own, *rest, name=name, loss=loss, params=params: loss(
            {**params, name: own}, *rest), has_aux=True)(params[name], extra, rows, None, step)
        updates, opt[name] = txs[name].update(grads, opt[name], params[name])
        params = {**params, name: optax.apply_updates(params[name], updates)}
        norms_now.append(float(optax.tree.norm(grads)))
        losses_now.append(float(value))
    path.append(params)
    norms.append(norms_now)
    losses.append(losses_now)
  return path, np.array(norms), np.array(losses), extra


def test_two_players_in_turn():
  history, state = run(toy())
  path, norms, losses, extra = by_hand()
  chex.assert_trees_all_close(state.params, path[-1], rtol=1e-6, atol=1e-6)
  chex.assert_trees_all_close(state.extra, extra, rtol=1e-6)
  assert int(state.extra["seen"]) == STEPS * (ROWS + 100)
  for metrics, norm, loss in zip(history, norms, losses):
    assert set(metrics) == {"loss", "grad_norm", "critic/loss", "critic/real", "critic/grad_norm",
                            "generator/loss", "generator/fake", "generator/grad_norm"}
    np.testing.assert_allclose(
      [metrics[f"{name}/{of}"] for of in ("loss", "grad_norm") for name in ("critic", "generator")],
      [*loss, *norm], rtol=2e-6)
    np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]],
                               [loss.sum(), np.linalg.norm(norm)], rtol=2e-6)
  assert set(state.opt) == {"critic", "generator"}
  held = jax.tree.map(np.shape, jax.tree.leaves(state.opt["critic"]))
  assert sorted(held) == sorted([(), (), (3, 1), (3, 1), (), ()])  # two counts, two moments each


def test_a_phase_taken_twice_has_half_the_rows_and_the_schedule_of_the_steps():
  history, state = run(toy(times=2))
  path, norms, losses, extra = by_hand(times=2)
  chex.assert_trees_all_close(state.params, path[-1], rtol=1e-6, atol=1e-6)
  assert int(state.extra["seen"]) == int(extra["seen"]) == STEPS * (ROWS + 100)
  np.testing.assert_allclose([m["critic/loss"] for m in history], losses[:, :2].mean(1), rtol=2e-6)
  once, _ = run(toy())
  assert abs(once[-1]["loss"] - history[-1]["loss"]) > 1e-4


@pytest.mark.parametrize("times", [1, 2])
def test_accumulation_changes_nothing(times):
  whole, parts = run(toy(times), name="sgd"), run(toy(times), name="sgd", accumulate=2)
  chex.assert_trees_all_close(parts[1].params, whole[1].params, atol=1e-6)
  losses = [[m["loss"] for m in history] for history, _ in (whole, parts)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert np.ptp(losses[0]) > 0.01


def test_each_phase_is_clipped_by_its_own_norm():
  sgd = functools.partial(optax.sgd, momentum=0.9)
  make = lambda rate, weight_decay, mask: optax.chain(  # noqa: E731
    optax.add_decayed_weights(weight_decay, mask), sgd(rate))
  _, state = run(toy(), name="sgd", clip_norm=0.3)
  path, norms, *_ = by_hand(clip=0.3, make=make)
  assert np.all(norms.min() > 0.3) and np.ptp(norms) > 0.1
  chex.assert_trees_all_close(state.params, path[-1], rtol=1e-6, atol=1e-6)


def test_the_average_is_taken_after_all_phases_and_has_its_statistics():
  method = toy(statistics="net")
  inner = method.init

  def inside(loss):
    def outer(params, extra, batch, rng, step):
      value, (own, metrics) = loss(params, extra["net"], batch, rng, step)
      return value, ({"net": own}, metrics)
    return outer

  method = method._replace(
    init=lambda *args: (inner(*args)[0], {"net": inner(*args)[1]}),
    phases={name: phase._replace(loss=inside(phase.loss)) for name, phase in method.turns.items()})
  _, state = run(method, ema_decay=0.5)
  path, *_ = by_hand()
  expected, mean = path[0], 0.0
  for step, params in enumerate(path[1:]):
    expected = jax.tree.map(lambda a, b: (a + b) / 2, expected, params)
    mean = 0.9 * mean + 0.1 * float(judge(expected, make_fake(
      expected, batch_of(step)["z"])).mean())
  chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.ema_statistics["mean"], mean, rtol=1e-5)
  assert abs(mean - float(state.extra["net"]["mean"])) > 1e-4


def test_one_phase_by_name_has_the_state_of_a_loss():
  def loss(params, extra, batch, rng, step):
    return critic_loss(params, extra, batch, rng, step)

  alone = run(Method(toy().init, loss, {}))
  named = run(Method(toy().init, None, {}, phases={"only": Phase(loss)}))
  chex.assert_trees_all_equal(named[1], alone[1])
  assert {name.removeprefix("only/") for name in named[0][0]} == set(alone[0][0])
  assert named[0][-1]["loss"] == alone[0][-1]["loss"] == named[0][-1]["only/loss"]


def test_what_is_frozen_needs_no_phase():
  method = toy()
  frozen = {"critic": method.phases["critic"], "generator": Phase(generator_loss, "generator/ker")}
  with pytest.raises(ValueError, match="no phase trains generator/out/kernel"):
    run(toy(phases=frozen))
  history, state = run(toy(phases=frozen), frozen="out/kernel")
  start = toy().init(jax.random.fold_in(jax.random.key(3), 0), None)[0]
  chex.assert_trees_all_equal(state.params["generator"]["out"], start["generator"]["out"])
  assert np.abs(state.params["generator"]["kernel"] - start["generator"]["kernel"]).max() > 1e-2
  # All that a phase trains may be frozen: the others go on.
  _, state = run(toy(), frozen="^critic/")
  chex.assert_trees_all_equal(state.params["critic"], start["critic"])
  assert np.abs(state.params["generator"]["kernel"] - start["generator"]["kernel"]).max() > 1e-2


@pytest.mark.parametrize("phases,message", [
  ({"critic": ("^critic/", 1), "generator": ("kernel", 1)},
   r"phase 'generator' \(part = 'kernel'\) and phase 'critic' \(part = '\^critic/'\) would "
   r"both train critic/kernel"),
  ({"critic": ("^crittic/", 1), "generator": ("", 1)},
   r"phase 'critic': part = '\^crittic/' matches no parameter; they are critic/bias, critic/k"),
  ({"critic": ("^critic/", 0), "generator": ("^generator/", 1)}, "phase 'critic': times = 0"),
  ({"critic": ("(", 1), "generator": ("^generator/", 1)}, r"part = '\(': no regular expression")])
def test_parts_that_cannot_be(phases, message):
  losses = {"critic": critic_loss, "generator": generator_loss}
  method = toy(phases={name: Phase(losses[name], *rest) for name, rest in phases.items()})
  with pytest.raises(ValueError, match=message):
    init = make_init(method, make_tx(method), lambda batch: batch, SPEC, 3, False)
    jax.eval_shape(init)


def test_a_method_has_a_loss_or_phases():
  for method in (Method(None, None, {}), toy(loss=critic_loss)):
    with pytest.raises(ValueError, match="a loss, or phases"):
      make_tx(method)


# --- On real recipes ------------------------------------------------------------------------------

def players(model, *, times: int = 2, **options: supervised.make):
  """A classifier whose head learns by itself, `times` a step, and what is before it after that."""
  method = supervised.make(model, **options)
  return method._replace(loss=None, phases={"head": Phase(method.loss, "^head/", times),
                                            "rest": Phase(method.loss, "^(?!head/)")})


@pytest.fixture
def module(monkeypatch):
  """methods/players.py, as if it were there."""
  made = types.ModuleType("methods.players")
  made.__spec__, made.make = importlib.machinery.ModuleSpec("methods.players", None), players
  monkeypatch.setitem(sys.modules, "methods.players", made)


def build(data_dir, **overrides):
  config = recipe.load_config("configs/vit.py:smoke", {
    "method.name": "players", "data.batch_size": "16", "model.drop_path": "0.2", **{
      name.replace("__", "."): value for name, value in overrides.items()}})
  return recipe.build(config, data_dir)


@pytest.mark.slow
def test_a_run_broken_off_goes_on_bit_for_bit(module, data_dir, tmp_path):
  flags = ["--config=configs/vit.py:smoke", f"--data_dir={data_dir}", "--config.accumulate=1",
           "--config.method.name=players", "--config.checkpoint.every_steps=2",
           "--config.checkpoint.keep=none", "--config.ema_decay=0.9",
           "--config.log_every_steps=1", "--config.evals.classification=none"]
  _, rows = broken_off(flags, tmp_path)
  assert len(rows) == 6
  assert {"train/loss", "train/head/loss", "train/rest/grad_norm"} <= set(rows[0])
  assert rows[0]["train/loss"] != rows[-1]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", suite([dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4)], 1), ids=str)
def test_eight_devices_equal_one(module, data_dir, mesh):
  built = build(data_dir, optimizer__name="sgd", optimizer__ns_steps="none", model__heads="4",
                optimizer__lr="0.1", schedule__warmup_steps="0", optimizer__clip_norm="1.0",
                ema_decay="0.9")
  ends = []
  for devices, sizes in ((jax.devices()[:1], {}), (None, mesh)):
    here = built._replace(mesh=sharding.make_mesh(**sizes, devices=devices))
    abstract, shardings = loop.abstract_state(here)
    state = jax.jit(loop.initial_state(here), out_shardings=shardings)()
    step = loop.jitted_step(here, shardings)
    for batch in here.data.train(0, 2):
      batch = jax.device_put(batch, sharding.batch_sharding(here.mesh))
      state, metrics = step(state, batch)
    ends.append(jax.device_get((state, metrics)))
  chex.assert_trees_all_close(ends[1], ends[0], rtol=1e-5, atol=3e-6)
  assert ends[0][1]["head/grad_norm"] > 0.01
  if "fsdp" in mesh:  # the optimizer's state is split as its part of the parameters is
    split = {jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec
             for path, x in jax.tree.leaves_with_path(abstract)}
    momenta = {path: spec for path, spec in split.items() if path.startswith("opt/rest/")
               and path.endswith("up/kernel")}
    assert list(momenta.values()) == [split["params/transformer/blocks/mlp/up/kernel"]]
    assert "fsdp" in str(momenta)


@pytest.mark.slow
def test_flops_are_of_each_phases_part_and_rows(module, data_dir):
  built = build(data_dir)
  state, _ = loop.abstract_state(built)
  whole = built._replace(config=built.config.copy_and_resolve_references())
  whole.config.method.name = "supervised"
  method = recipe.make_method(whole.config)
  batch = jax.eval_shape(lambda spec: method.draw(jax.random.key(0), built.augment.train(
    jax.random.key(0), spec)), built.data.spec)
  forward = count_flops(lambda *args: method.loss(*args, jax.random.key(0), 0)[0],
                        state.params, state.extra, batch)
  # The head's own phase goes forward once more; what is before it has no gradient there.
  assert loop.model_flops(built, state) == loop.model_flops(whole, state) + forward > 0
  assert plan.plan(built, "cpu:8")["model_flops"] == loop.model_flops(built, state)


def test_a_batch_has_rows_for_every_turn(module, data_dir, tmp_path, capsys):
  flags = ["--config=configs/vit.py:smoke", f"--data_dir={data_dir}", f"--workdir={tmp_path / 'x'}",
           "--config.method.name=players", "--config.method.times=3"]
  assert train.main(flags) == 1
  assert "is not a multiple of 24: mesh.data (8) x mesh.fsdp (1) x accumulate (1) x times (3) of " \
         "phase head" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()
